"""Where a progress line is drawn: at the bottom of a terminal, or as ordinary lines of a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:
    from cppo_lightning.callbacks.progress_line import ProgressLine


class ProgressDisplay:
    """Shows what ``line`` returns until ``stop``; what others print or log meanwhile appears above it.

    Args:
        line: makes the line, also from the thread that redraws it.
        refresh_per_second: how often it is redrawn in a terminal.
    """

    def __init__(self, line: Callable[[], ProgressLine], refresh_per_second: float) -> None:
        self.console = Console(emoji=False)
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._live: Live | None = None
        self._printed = time.monotonic()
        # FORCE_COLOR makes rich take a file for a terminal
        if self.console.is_terminal and not self.console.is_dumb_terminal and self.console.file.isatty():
            old_streams = (sys.stdout, sys.stderr)
            self._live = Live(get_renderable=line, console=self.console, refresh_per_second=refresh_per_second)
            self._live.start(refresh=True)
            self._reroute_logging(old_streams)

    @property
    def moves(self) -> bool:
        """Whether the line is redrawn in place."""
        return self._live is not None

    @property
    def silence(self) -> float:
        """Seconds since the last line of text, or the start."""
        return time.monotonic() - self._printed

    def print(self, text: str) -> None:
        """One line of text, above the moving line if there is one."""
        self._printed = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def stop(self) -> None:
        """Leave the last state of the line behind and give the terminal back."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _reroute_logging(self, old_streams: tuple[Any, ...]) -> None:
        """Log handlers hold the streams from before, and would write into the line."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in old_streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)
