"""Answers to chains of operations: every running value is written, and the last one counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier

_VALUES = re.compile(r"[0-9](?:,[0-9])*")


@dataclass(frozen=True)
class ChainVerifier(Verifier):
    """Correct when a response to a problem of ``ChainPrompts`` ends with the right digit, whatever stands before it.

    It must be the running values and nothing else: as many digits as the chain has operations, with one comma between two and
    white space at most around them all.  Anything else is unparseable.
    """

    def __call__(self, problem: Problem, response: str) -> Verdict:
        text = response.strip()
        if _VALUES.fullmatch(text) is None or len(text) != len(problem.answer):
            return Verdict(Outcome.UNPARSEABLE, 0.0)
        if text[-1] != problem.answer[-1]:
            return Verdict(Outcome.WRONG, 0.0, text[-1])
        return Verdict(Outcome.CORRECT, 1.0, text[-1])

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` unless the answer is a chain's running values."""
        if _VALUES.fullmatch(problem.answer) is None:
            raise ValueError(f"not the running values of a chain, such as 3,1,4: {problem.answer[:80]!r}")
