"""Where problems come from, and the check that each can be judged."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRowError, BadRows
from cppo_lightning.verifiers.base import Outcome, Problem, Verifier
from cppo_lightning.verifiers.pool import VerifierPool


class PromptSource(ABC):
    """A set of problems.  Children are frozen dataclasses, chosen in YAML by ``class_path``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "load" in cls.__dict__ and "bad_rows" not in inspect.signature(cls.load).parameters:
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__}.load must take what is done with bad rows, even if it has none: "
                "def load(self, bad_rows=None)"
            )

    @abstractmethod
    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        """All problems, in an order that is the same at every call and with ids that are unique.

        Args:
            bad_rows: counts what is left out, and says whether a bad row stops the loading; None for a strict one.

        Raises:
            ConfigError: bad settings, nothing to train on, or a row that cannot be used, named by file and line.
        """

    def shares(self) -> dict[str, float] | None:
        """How often each set (``Problem.dataset``) is drawn, in any unit; None draws every problem once per pass."""
        return None


def check_problems(
    problems: Sequence[Problem], verifier: Verifier | VerifierPool, bad_rows: BadRows | None = None
) -> list[Problem]:
    """Run ``Verifier.check`` on every problem, in worker processes: a gold answer may be as hard to stop as a response.

    Args:
        problems: what will be trained or evaluated on.
        verifier: a running pool, or a verifier, which gets a pool for the time of the check.
        bad_rows: whether problems that cannot be judged are left out and counted; None for a strict one.

    Returns:
        The problems that can be judged.

    Raises:
        ConfigError: the first problem whose answer could never be verified, by id and place, and how many there are; when they
            are left out, only if there is no other.  A problem that was twice not checked by the deadline is one in any case:
            what is trained on must not depend on how busy a machine is.
    """
    if isinstance(verifier, Verifier):
        with VerifierPool(verifier) as pool:
            return check_problems(problems, pool, bad_rows)
    counts = BadRows() if bad_rows is None else bad_rows
    verdicts = verifier.check(problems)
    late = [place for place, verdict in enumerate(verdicts) if verdict.outcome is Outcome.TIMED_OUT]
    for place, verdict in zip(late, verifier.check([problems[place] for place in late]), strict=True):
        verdicts[place] = verdict
    name = type(verifier.verifier).__name__
    if late := [place for place in late if verdicts[place].outcome is Outcome.TIMED_OUT]:
        raise ConfigError(
            f"{_place(problems[late[0]])}: {name} has twice not checked it in VerifierPool.deadline = {verifier.deadline:g} s; "
            f"raise the deadline, or remove it ({len(late)} of {len(problems)} are like this)"
        )
    reason = f"cannot be judged by {name}"
    judged = [problem for problem, verdict in zip(problems, verdicts, strict=True) if verdict.outcome is Outcome.CORRECT]
    failed = [
        BadRowError(_place(problem), reason, verdict.detail.removeprefix("ValueError: "))
        for problem, verdict in zip(problems, verdicts, strict=True)
        if verdict.outcome is not Outcome.CORRECT
    ]
    if failed and not (counts.skip and judged):
        raise ConfigError(f"{failed[0]}; correct or remove it ({len(failed)} of {len(problems)} are like this)")
    for bad in failed:
        counts.add(bad)
    return judged


def _place(problem: Problem) -> str:
    return f"problem {problem.id!r} ({problem.source or 'no source given'})"
