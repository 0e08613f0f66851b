"""A reward made of several verifiers' rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Problem, Verdict, Verifier


@dataclass(frozen=True)
class WeightedSum(Verifier):
    """The sum of ``weights[name]`` times the reward of ``verifiers[name]``.

    The first verifier decides what a correct answer is: outcome, extracted answer and detail are its own, and it alone
    checks problems before training, since a form or a style has no gold answer that could be wrong.  The others only move
    the reward; each one's stands in ``Verdict.parts``, unweighted.  All of them share the deadline of one response: an
    exception in any is the whole's, which makes the response FAILED or TIMED_OUT with reward 0.

    Args:
        verifiers: by a name of your choice; the first decides.
        weights: for the same names; negative ones are penalties.

    Raises:
        ConfigError: no verifier, names that differ, or a weight that is not finite.
    """

    verifiers: dict[str, Verifier]
    weights: dict[str, float]

    def __post_init__(self) -> None:
        if not self.verifiers:
            raise ConfigError("WeightedSum.verifiers is empty; give at least one, by name")
        if set(self.verifiers) != set(self.weights):
            raise ConfigError(
                f"WeightedSum.weights has the names {sorted(self.weights)} and WeightedSum.verifiers {sorted(self.verifiers)}; "
                "give each verifier one weight"
            )
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"WeightedSum.weights[{name!r}] must be a finite number, got {weight}")

    def prepare(self) -> None:
        for verifier in self.verifiers.values():
            verifier.prepare()

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` if the first verifier does."""
        next(iter(self.verifiers.values())).check(problem)

    def __call__(self, problem: Problem, response: str) -> Verdict:
        verdicts = {name: verifier(problem, response) for name, verifier in self.verifiers.items()}
        parts = {name: verdict.reward for name, verdict in verdicts.items()}
        reward = sum(self.weights[name] * part for name, part in parts.items())
        return replace(next(iter(verdicts.values())), reward=reward, parts=parts)
