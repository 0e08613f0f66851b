"""One call in a thread of its own, which can be stopped."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs ``call`` in a thread from now on; an executor of Python's would wait for its end when the process exits.

    Args:
        call: what is run.
        name: of the thread.
    """

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Return once the call has ended, however it ended, or after ``seconds``; whether it has ended."""
        return bool(wait([self._future], seconds).done)

    def result(self) -> T:
        """What the call returns, or raises; waits for it."""
        return self._future.result()

    def outcome(self) -> T | None:
        """What the call has returned by now; None if it has not ended, or has raised."""
        return self._future.result() if self._future.done() and self._future.exception() is None else None

    def stop(self, seconds: float) -> bool:
        """Raise ``SystemExit`` in the call, as Ctrl-C raises in the main thread: at its next Python instruction.

        Returns:
            Whether it has ended within ``seconds``.
        """
        if self._thread.ident is not None and self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(SystemExit))
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            value = call()
        except BaseException as error:  # raised where the result is asked for
            self._future.set_exception(error)
        else:
            self._future.set_result(value)
