"""Where problems come from, and the check that each can be judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Outcome, Problem, Verifier
from cppo_lightning.verifiers.pool import VerifierPool


class PromptSource(ABC):
    """A set of problems.  Children are frozen dataclasses, chosen in YAML by ``class_path``."""

    @abstractmethod
    def load(self) -> list[Problem]:
        """All problems, in an order that is the same at every call.

        Raises:
            ConfigError: bad settings, or a row that cannot be used, named by file and line.
        """


def check_problems(problems: Sequence[Problem], verifier: Verifier | VerifierPool) -> None:
    """Run ``Verifier.check`` on every problem, in worker processes: a gold answer may be as hard to stop as a response.

    Args:
        problems: what will be trained or evaluated on.
        verifier: a running pool, or a verifier, which gets a pool for the time of the check.

    Raises:
        ConfigError: the first problem whose answer could never be verified, by id and place, and how many there are.
    """
    if isinstance(verifier, Verifier):
        with VerifierPool(verifier) as pool:
            check_problems(problems, pool)
        return
    verdicts = verifier.check(problems)
    failed = [(p, v) for p, v in zip(problems, verdicts, strict=True) if v.outcome is not Outcome.CORRECT]
    if failed:
        problem, verdict = failed[0]
        reason = verdict.detail.removeprefix("ValueError: ")
        raise ConfigError(
            f"problem {problem.id!r} ({problem.source or 'no source given'}) cannot be judged by "
            f"{type(verifier.verifier).__name__}: {reason}; "
            f"correct or remove it ({len(failed)} of {len(problems)} are like this)"
        )
