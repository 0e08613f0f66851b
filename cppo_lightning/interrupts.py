"""Ctrl-C and SIGTERM end a run where nothing is half done: between two optimizer steps, or in the middle of a rollout, which is
drawn again when the run goes on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# a terminal, a launcher and the other ranks may each pass the same signal on
_SAME_SECONDS = 2.0


class Interrupted(KeyboardInterrupt):
    """A signal ends the run, where nothing is half done.  A second signal raises a bare ``KeyboardInterrupt``, anywhere."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"interrupted by {received.name}")
        self.received = received


class Interrupts:
    """What :data:`SIGNALS` do in this process, where :data:`INTERRUPTS` is the only one.

    Attributes:
        received: the first signal that came; None before.
        deferred: whether a signal waits for the next :meth:`check` or :meth:`at_once`, in place of raising where it finds the
            main thread.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferred = False
        self._since = 0.0
        self._handling = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Signals that come inside raise :class:`Interrupted`; handlers are as before afterwards."""
        if not _in_main_thread():  # Python lets no other set handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.received, self.deferred, self._handling = None, False, True
        self.handle()
        try:
            yield
        finally:
            self.deferred = self._handling = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self) -> None:
        """Inside :meth:`handled`, take the signals back from who has taken them there; not those that this process ignores."""
        for number in SIGNALS if self._handling else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside nothing can be left half done: signals raise there, the one that came before included.

        In other threads than the main one, where Python handles no signals, it does nothing.
        """
        if not _in_main_thread():
            yield
            return
        before, self.deferred = self.deferred, False
        try:
            if before:
                self.check()
            yield
        finally:
            self.deferred = before

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _received(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            if not self.deferred:
                self.check()
        elif time.monotonic() - self._since > _SAME_SECONDS:
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()


def pass_on(received: signal.Signals) -> None:
    """Give this process a signal that another rank got; from any thread, and the main one wakes if it waits for a lock."""
    main = threading.main_thread().ident
    if INTERRUPTS.received is None and main is not None:
        signal.pthread_kill(main, received)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
