"""Rows that cannot be used: an error at the first, or a count of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cppo_lightning.errors import ConfigError

_EXAMPLES = 5


class BadRowError(ConfigError):
    """One row that cannot be used.

    Args:
        place: file and line, or file and row.
        reason: what is wrong, in words that many rows can share; they are counted by it.
        detail: what was found there and what would be right.
    """

    def __init__(self, place: str, reason: str, detail: str) -> None:
        super().__init__(f"{place}: {reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class LoadCounts:
    """What became of the rows that were read: ``rows - repeated - conflicting - bad`` are problems.

    Args:
        rows: rows read.
        repeated: rows with a question that came before.
        conflicting: questions left out because their rows disagree about the answer.
        bad: rows that cannot be used, answers that cannot be judged among them.
    """

    rows: int = 0
    repeated: int = 0
    conflicting: int = 0
    bad: int = 0


@dataclass
class BadRows:
    """Goes through the loading of problems, stops at the first bad row or counts them, and keeps the other counts too.

    Args:
        skip: count bad rows and go on; otherwise the first is a :class:`ConfigError`.
    """

    skip: bool = False
    rows: int = field(default=0, init=False)
    repeated: int = field(default=0, init=False)
    conflicting: int = field(default=0, init=False)
    reasons: Counter[str] = field(default_factory=Counter, init=False)  # rows by what is wrong with them
    examples: list[str] = field(default_factory=list, init=False)  # messages of the first few

    @property
    def counts(self) -> LoadCounts:
        return LoadCounts(self.rows, self.repeated, self.conflicting, self.reasons.total())

    @contextmanager
    def row(self) -> Iterator[None]:
        """Around the reading of one row, which raises :class:`BadRowError` if it is one."""
        self.rows += 1
        try:
            yield
        except BadRowError as bad:
            self.add(bad)

    def add(self, bad: BadRowError) -> None:
        """Count a bad row, or raise it."""
        if not self.skip:
            raise bad
        self.reasons[bad.reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(bad))

    def merge(self, part: BadRows) -> None:
        """Add the counts of a part of the data."""
        self.rows += part.rows
        self.repeated += part.repeated
        self.conflicting += part.conflicting
        self.reasons += part.reasons
        self.examples = [*self.examples, *part.examples][:_EXAMPLES]

    def summary(self) -> str:
        """Why rows are bad, as ``3 no answer, 1 not JSON; first: FILE:7: ...``; empty if none is."""
        if not self.reasons:
            return ""
        return f"{', '.join(f'{count} {reason}' for reason, count in self.reasons.most_common())}; first: {self.examples[0]}"
