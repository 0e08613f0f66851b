"""A pool of verifier processes that can really be stopped: a deadline and a memory limit per item, and SIGKILL at its end."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Problem, Verdict, Verifier
from cppo_lightning.verifiers.dispatcher import Dispatcher
from cppo_lightning.verifiers.protocol import Item, Setup


class VerifierPool:
    """Judges responses in child processes, which start with the first one.

    A supervisor process loads the verifier once, and workers are forks of it: no child is a fork of this process or runs its
    ``__main__``.  An item that is not done at its deadline is TIMED_OUT and its worker killed.  An item by which a worker has
    died or reached its memory limit gets a new worker once more, and is then FAILED; one whose worker is killed by someone else
    gets up to eight.  No other item is affected.  May be used by several threads, and on both sides of a fork.

    Args:
        verifier: judges one response; pickled to the supervisor.
        workers: number of processes that judge.
        deadline: seconds per item, from the moment a worker starts on it.
        memory_mb: address space of each worker, in MiB; an item that needs more is FAILED.
        max_pending: items without a verdict, beyond which ``submit`` waits.

    Raises:
        ConfigError: a value out of range, or a verifier that cannot be sent to another process.
    """

    def __init__(
        self, verifier: Verifier, workers: int = 2, deadline: float = 10.0, memory_mb: int = 2048, max_pending: int = 4096
    ) -> None:
        if workers < 1:
            raise ConfigError(f"VerifierPool.workers must be at least 1, got {workers}")
        if not 0 < deadline < float("inf"):
            raise ConfigError(f"VerifierPool.deadline must be a positive number of seconds, got {deadline}")
        if memory_mb < 256:
            raise ConfigError(f"VerifierPool.memory_mb must be at least 256 (Python with SymPy takes that), got {memory_mb}")
        if max_pending < 1:
            raise ConfigError(f"VerifierPool.max_pending must be at least 1, got {max_pending}")
        self.verifier = verifier
        self.workers = workers
        self.deadline = deadline
        self.memory_mb = memory_mb
        self.max_pending = max_pending
        self._pickled = _pickle_verifier(verifier)
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._finalizer: weakref.finalize | None = None
        _POOLS.add(self)

    def submit(self, problem: Problem, response: str) -> Future[Verdict]:
        """Have a response judged, meanwhile.  Waits while ``max_pending`` items have no verdict.

        The future's ``result`` raises :class:`ConfigError` if the verifier cannot be loaded, :class:`RolloutError` if its
        processes end before they judge anything, and ``CancelledError`` if the pool was closed.
        """
        return self._submit(Item(problem, response))

    def judge(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict per (problem, response), in order.

        Raises:
            ConfigError: the verifier could not be loaded.
            RolloutError: its processes end before they judge anything.
        """
        return self._run([Item(problem, response) for problem, response in pairs])

    def check(self, problems: Sequence[Problem]) -> list[Verdict]:
        """``Verifier.check`` on each problem, in order: CORRECT, or FAILED or TIMED_OUT with the reason in ``detail``."""
        return self._run([Item(problem, None) for problem in problems])

    def close(self) -> None:
        """Kill the processes and cancel what has no verdict.  Safe to call twice; what is submitted later starts new ones."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return VerifierPool, (self.verifier, self.workers, self.deadline, self.memory_mb, self.max_pending)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [] if self._dispatcher is None else list(self._dispatcher.pids)

    def _run(self, items: list[Item]) -> list[Verdict]:
        futures: list[Future[Verdict]] = []
        try:
            for item in items:
                futures.append(self._submit(item))
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()  # nobody will read it
            raise

    def _submit(self, item: Item) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        while not self._running().put(item, future):
            pass
        return future

    def _running(self) -> Dispatcher:
        with self._lock:
            if self._dispatcher is None or self._dispatcher.ended:
                setup = Setup(self._pickled, list(sys.path), os.getpid(), self.workers, self.deadline, self.memory_mb)
                self._dispatcher = Dispatcher(setup, type(self.verifier).__name__, self.max_pending)
                self._finalizer = weakref.finalize(self, self._dispatcher.close)
            return self._dispatcher

    def _forget(self) -> None:
        """After a fork, in the child: start anew, since the thread is not here and the processes are the parent's."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._dispatcher is not None:
            self._dispatcher.forget()
        self._lock, self._dispatcher, self._finalizer = threading.Lock(), None, None


_POOLS: weakref.WeakSet[VerifierPool] = weakref.WeakSet()


def _forget_pools() -> None:
    for pool in list(_POOLS):
        pool._forget()


os.register_at_fork(after_in_child=_forget_pools)


def _pickle_verifier(verifier: Verifier) -> bytes:
    name = type(verifier).__qualname__
    if not isinstance(verifier, Verifier):
        raise ConfigError(f"VerifierPool.verifier must be a cppo_lightning.verifiers.Verifier, got {name}")
    if type(verifier).__module__ == "__main__":
        raise ConfigError(
            f"the verifier {name} is defined in the script or notebook that is running, which worker processes do not run: "
            "move it to a module and import it from there"
        )
    try:
        return pickle.dumps(verifier)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the verifier {name} cannot be pickled and so not sent to a worker process: {error}; define its class at the top "
            "of a module and keep only plain data in it"
        ) from error
