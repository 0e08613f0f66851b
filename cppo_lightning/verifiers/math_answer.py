"""Mathematical answers: numbers by normalising their text, everything else by math-verify on a short, boxed extract."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.normalise import (
    balanced,
    last_answer_line,
    last_boxed,
    read_number,
    squeeze,
    strip_thinking,
    undress,
)

# Writing the question down again is no answer: these may stand in a response only if the gold answer has them too.
_UNEVALUATED = re.compile(
    r"\\(?:sum|prod|coprod|i*int|oint|lim|limsup|liminf|max|min|gcd|lcm|[dt]?binom|det|operatorname)(?![A-Za-z])|!|\\frac\s*\{\s*d\s*\}"
)


@dataclass(frozen=True)
class MathAnswer(Verifier):
    r"""Reads the last ``\boxed{...}``, else the last ``Answer:`` line, and compares it with the gold answer.

    A gold number is compared as a number that was written out: ``025``, ``25.0`` and ``\$25`` are 25, and ``20+5`` is not.
    Reward 1 for a correct answer, else 0.  A thinking block up to ``</think>`` is not read.

    Args:
        bare: also read a response that is nothing but a number.
        max_chars: longest answer that is looked at, in characters.
    """

    bare: bool = False
    max_chars: int = 1000

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ConfigError(f"MathAnswer.max_chars must be at least 1, got {self.max_chars}")

    def prepare(self) -> None:
        """Import math-verify and SymPy, so that no answer's time goes into it."""
        _latex_equal("x", "x^{2}")

    def extract(self, response: str) -> str | None:
        """The answer as the response states it, or None."""
        text = strip_thinking(response)
        found = last_boxed(text)
        if found is None:
            found = last_answer_line(text)
        if found is None and self.bare and len(text) <= self.max_chars and read_number(text) is not None:
            found = text
        return found if found is None or undress(found[: self.max_chars]) else None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        extracted = self.extract(response)
        if extracted is None:
            return Verdict(Outcome.UNPARSEABLE, 0.0)
        if len(extracted) > self.max_chars:
            return Verdict(Outcome.UNPARSEABLE, 0.0, extracted[: self.max_chars], f"answer of {len(extracted)} characters")
        if self._equal(problem.answer, extracted):
            return Verdict(Outcome.CORRECT, 1.0, extracted)
        return Verdict(Outcome.WRONG, 0.0, extracted)

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` unless the gold answer, in a box, is read back and equals itself the way a response must."""
        gold = problem.answer
        if not balanced(gold):
            raise ValueError(f"the answer {gold[:80]!r} has unmatched braces")
        boxed = self.extract(f"\\boxed{{{gold}}}")
        if boxed is None or not boxed.strip() or len(gold) > self.max_chars:
            raise ValueError(f"the answer {gold[:80]!r} is empty or longer than {self.max_chars} characters")
        if read_number(gold) is None and not _latex_equal(gold, boxed):
            raise ValueError(f"math-verify does not find the answer {gold[:80]!r} equal to itself")

    @staticmethod
    def _equal(gold: str, answer: str) -> bool:
        number = read_number(gold)
        if number is not None:
            return read_number(answer) == number
        if squeeze(answer) == squeeze(gold):
            return True
        if not balanced(answer) or set(_UNEVALUATED.findall(answer)) - set(_UNEVALUATED.findall(gold)):
            return False
        return _latex_equal(gold, undress(answer))


def _latex_equal(gold: str, answer: str) -> bool:
    import math_verify

    # A time limit inside would be reported as "not equal"; the pool's deadline tells the two apart.
    return math_verify.verify(_parse_gold(gold), _parse(answer), timeout_seconds=None, raise_on_error=True)


def _parse(latex: str) -> list[Any]:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    # Only the LaTeX reader, and only of the box: the plain-expression reader hands its text to Python's eval.
    boxed_only = [math_verify.LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
    return math_verify.parse(f"\\boxed{{{latex}}}", boxed_only, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=4096)
def _parse_gold(latex: str) -> list[Any]:
    return _parse(latex)
