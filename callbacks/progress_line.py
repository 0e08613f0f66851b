"""One line that says where a run stands, drawn to fit its terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.style import Style

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BAR_WIDTHS = (8, 30)  # fewest and most columns of the bar; with less room it goes before any number does
PHASE_WIDTH = 16  # phases are padded to this, so that the numbers stand still


@dataclass
class ProgressLine:
    """What the line says.  The times are seconds."""

    noun: str = "rollout"
    done: int = 0  # finished
    total: int | None = None
    within: float = 0.0  # share of the running one that is behind us
    phase: str = ""
    numbers: Mapping[str, str] = field(default_factory=dict)  # text by metric, the most important first
    elapsed: float = 0.0
    left: float | None = None

    @property
    def count(self) -> str:
        """``rollout  7/22``, counting the running one; of the same width all along."""
        current = self.done if self.total is not None and self.done >= self.total else self.done + 1
        if self.total is None:
            return f"{self.noun} {current}"
        return f"{self.noun} {current:>{len(str(self.total))}}/{self.total}"

    @property
    def time(self) -> str:
        return f"{clock(self.elapsed)} elapsed" if self.left is None else f"{clock(self.left)} left"

    def plain(self) -> str:
        """The line for a log file."""
        return " | ".join(text for text in (self.count, self.phase, *self.numbers.values(), self.time) if text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        fields = [self.count, self.phase.ljust(PHASE_WIDTH), *self.numbers.values(), self.time]
        while len(fields) > 3 and _width(fields) > width:
            del fields[-2]  # the least important number
        room = width - _width(fields) - 2
        yield Segment(fields[0][:width], Style(bold=True))
        if self.total and room >= BAR_WIDTHS[0]:
            yield Segment("  ")
            yield from self._bar(min(room, BAR_WIDTHS[1]), options.ascii_only)
        rest = "".join(f"  {value}" for value in fields[1:])
        yield Segment(rest[: max(0, width - len(fields[0]))])
        yield Segment.line()

    def _bar(self, width: int, ascii_only: bool) -> RenderResult:
        share = min(1.0, (self.done + self.within) / self.total) if self.total else 0.0
        full = int(width * share)
        yield Segment(("#" if ascii_only else "━") * full, Style(color="green"))
        yield Segment(("-" if ascii_only else "━") * (width - full), Style(color="bright_black"))


def clock(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``3:04:05``."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _width(fields: list[str]) -> int:
    return sum(map(len, fields)) + 2 * (len(fields) - 1)
