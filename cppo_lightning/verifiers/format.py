"""Rewards the form of a response, whatever its content."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier


@dataclass(frozen=True)
class Format(Verifier):
    """Correct when a regular expression is found in the response.

    Args:
        pattern: Python regular expression; anchor it with ``\\A`` and ``\\Z`` to judge the whole response.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"Format.pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, problem: Problem, response: str) -> Verdict:
        found = re.search(self.pattern, response, re.DOTALL)
        if found is None:
            return Verdict(Outcome.WRONG, 0.0)
        return Verdict(Outcome.CORRECT, 1.0, found.group())
