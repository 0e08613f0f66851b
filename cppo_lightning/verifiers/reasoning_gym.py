"""Answers to reasoning-gym tasks, scored by the task itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.normalise import strip_thinking

KNOWN = "0.1.25"  # whose scorers have all been run under an audit of what Python compiles
# Their scorers hand the answer to Python's eval, directly or through SymPy's parse_expr.
EVALUATES_ANSWERS = frozenset(
    (
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)
INSTALL = "reasoning-gym is not installed; install it with: pip install 'cppo-lightning[tasks]'"


def refuse_evaluating(task: str) -> None:
    """Raise :class:`ConfigError` for a task whose scorer would execute what a model wrote."""
    if task in EVALUATES_ANSWERS:
        raise ConfigError(
            f"reasoning-gym's scorer of {task!r} executes the answer as Python, so it is refused; take another task"
        )


def library() -> ModuleType:
    """The package reasoning_gym.

    Raises:
        ConfigError: it is not installed, or is another version, whose scorers may execute answers too.
    """
    try:
        found = version("reasoning-gym")
        import reasoning_gym
    except ImportError as error:  # PackageNotFoundError is one
        raise ConfigError(INSTALL) from error
    if found != KNOWN:
        raise ConfigError(
            f"reasoning-gym {found} is installed, but which scorers execute what a model writes is known of {KNOWN} alone; "
            f"install it with: pip install 'reasoning-gym=={KNOWN}'"
        )
    return reasoning_gym


@dataclass(frozen=True)
class ReasoningGym(Verifier):
    """Scores the response with reasoning-gym's own scorer of the problem's task.

    The answer is the last ``<answer>...</answer>`` of the response, else the last match of ``pattern``, without a thinking
    block and outer spaces.  A score of at least 1 is correct.  ``problem.metadata`` holds ``task`` (its name) and ``entry``.

    Args:
        pattern: regular expression of an untagged answer; null takes the whole response.  ``-?\\d+`` is the last integer,
            for models too small to answer with nothing else.
        partial_credit: reward a lower score with the score itself instead of 0; the outcome stays wrong.

    Raises:
        ConfigError: ``pattern`` is not a regular expression.
    """

    pattern: str | None = None
    partial_credit: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"ReasoningGym.pattern {self.pattern!r} is not a regular expression: {error}") from error

    def prepare(self) -> None:
        """Import reasoning-gym, so that no answer's time goes into it."""
        _scorer("basic_arithmetic")

    def extract(self, response: str) -> str:
        """The answer as the response states it; empty when there is none."""
        text = strip_thinking(response)
        _, opened, inside = text.rpartition("<answer>")
        if opened:
            return inside.partition("</answer>")[0].strip()
        if self.pattern is None:
            return text.strip()
        return next((match.group() for match in reversed(list(re.finditer(self.pattern, text)))), "").strip()

    def __call__(self, problem: Problem, response: str) -> Verdict:
        extracted = self.extract(response)
        if not extracted:
            return Verdict(Outcome.UNPARSEABLE, 0.0)
        score = self._score(problem, extracted)
        if score >= 1:
            return Verdict(Outcome.CORRECT, 1.0, extracted)
        return Verdict(Outcome.WRONG, max(score, 0.0) if self.partial_credit else 0.0, extracted)

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` unless the task's scorer accepts the task's own answer, where it has one."""
        answer = problem.metadata["entry"]["answer"] if "entry" in problem.metadata else problem.answer
        score = self._score(problem, "" if answer is None else str(answer))
        if answer is not None and score < 1:
            raise ValueError(f"reasoning-gym scores its own answer {str(answer)[:80]!r} with {score}")

    @staticmethod
    def _score(problem: Problem, answer: str) -> float:
        if "task" not in problem.metadata or "entry" not in problem.metadata:
            raise ValueError("not a reasoning-gym problem: its metadata has no 'task' and 'entry'")
        task = problem.metadata["task"]
        refuse_evaluating(task)
        return float(_scorer(task)(answer, problem.metadata["entry"]))


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    return library().get_score_answer_fn(task)
