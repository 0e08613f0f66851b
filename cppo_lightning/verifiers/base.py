"""What is asked, what was answered, and what a verifier says of it.  No torch here: verifiers run in small child processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One row of a prompt source.

    ``messages`` are chat turns (``{"role": ..., "content": ...}``); a plain problem is one user turn.
    ``source`` is where the row stands (file and line), for messages; ``dataset`` the name of the set it belongs to, where
    there are several.  ``metadata`` is what the row's verifier needs beyond the answer (a reasoning-gym entry, for example).
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""


class Outcome(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"  # no answer could be read from the response
    TIMED_OUT = "timed_out"  # the verifier was killed at its deadline
    FAILED = "failed"  # the verifier raised, or its process died


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    reward: float
    extracted: str | None = None  # the answer as it was read from the response
    detail: str = ""  # what went wrong, for TIMED_OUT and FAILED
    parts: Mapping[str, float] = field(default_factory=dict)  # the rewards that a sum is made of, by name


class Verifier(ABC):
    """Judges one response.  Instances are pickled to worker processes, so keep their state small and picklable."""

    @abstractmethod
    def __call__(self, problem: Problem, response: str) -> Verdict:
        """Return a verdict; may raise (FAILED) or never return (killed at the deadline, TIMED_OUT)."""

    def prepare(self) -> None:
        """Do what is slow the first time, imports above all.

        Called once, before any deadline runs, in the process that the workers are forked from: start no threads and open no
        connections there.
        """

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` if this problem's gold answer could never be verified.  Called once per problem."""
