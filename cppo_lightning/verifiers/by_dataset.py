"""Another verifier for each data set of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Problem, Verdict, Verifier


@dataclass(frozen=True)
class ByDataset(Verifier):
    """Hands a response to ``verifiers[problem.dataset]``.

    Args:
        verifiers: by the names that the sets have in the mixture.
        default: for problems of any other set, evaluation sets for example; null refuses them.

    Raises:
        ConfigError: no verifier.
    """

    verifiers: dict[str, Verifier]
    default: Verifier | None = None

    def __post_init__(self) -> None:
        if not self.verifiers:
            raise ConfigError("ByDataset.verifiers is empty; give one for each data set, by its name in the mixture")

    def prepare(self) -> None:
        for verifier in (*self.verifiers.values(), self.default):
            if verifier is not None:
                verifier.prepare()

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` if the problem's data set has no verifier, or its verifier does."""
        self._of(problem).check(problem)

    def __call__(self, problem: Problem, response: str) -> Verdict:
        return self._of(problem)(problem, response)

    def _of(self, problem: Problem) -> Verifier:
        verifier = self.verifiers.get(problem.dataset, self.default)
        if verifier is None:
            raise ValueError(
                f"no verifier for the data set {problem.dataset!r}; ByDataset has {', '.join(self.verifiers)} and no default"
            )
        return verifier
