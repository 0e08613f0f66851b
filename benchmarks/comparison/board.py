"""What a sweep shows while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.comparison.grid import Run, Study

_LAST = 3  # runs whose accuracy is shown


@dataclass
class Board:
    """Runs done of all, the time left, and the accuracy of the last ones.

    Args:
        study: that says how long a run is expected to take.
        total: runs in all.
        cores: that share them.
    """

    study: Study
    total: int
    cores: int
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        # refreshed by hand: a thread that refreshes it could hold the console's lock while a run is forked; and a run would
        # inherit what the bar puts in place of stdout, which draws it into the run's log
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._progress = Progress(
            *columns, auto_refresh=False, console=self.console, redirect_stdout=False, redirect_stderr=False
        )
        self._bar = self._progress.add_task("", total=self.total)
        self._taken = self._expected = 0.0  # seconds on one core, of runs of this session
        self._accuracies: deque[str] = deque(maxlen=_LAST)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def tell(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def ended(self, run: Run, seconds: float | None, accuracy: float | None) -> None:
        """Take note of a run that has a result now; ``accuracy``: None of one that failed."""
        if seconds is not None:
            self._taken += seconds
            self._expected += self._expect([run])
        self._accuracies.append(f"{run.method} {'failed' if accuracy is None else f'{accuracy:.2f}'}")

    def show(self, left: Sequence[Run]) -> None:
        """``left``: the runs without a result."""
        pace = self._taken / self._expected if self._expected else 1.0
        minutes = round(pace * self._expect(left) / self.cores / 60)
        text = " | ".join([f"{minutes // 60}:{minutes % 60:02d} h left", *self._accuracies])
        self._progress.update(self._bar, completed=self.total - len(left), description=text, refresh=True)

    def _expect(self, runs: Sequence[Run]) -> float:
        return sum(self.study.tasks[run.task].core_seconds for run in runs)
