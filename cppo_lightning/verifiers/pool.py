"""A pool of verifier processes that can really be stopped: a deadline and a memory limit per item, and SIGKILL at its end."""

from __future__ import annotations

import math
import os
import pickle
import selectors
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.process import State, WorkerProcess
from cppo_lightning.verifiers.protocol import Item, Setup, decode_verdict

_START_SECONDS = 120.0  # to import a verifier's libraries from a cold disk
_MAX_LOSSES = 4  # workers lost in a row, per worker of the pool
_MAX_BATCH = 64  # items
_MAX_BATCH_BYTES = 1 << 20


class VerifierPool:
    """Judges responses in child processes, which start at the first call.

    A child is neither a fork of this process nor runs its ``__main__``.  An item that is not done at its deadline is TIMED_OUT
    and its worker killed.  An item whose worker dies goes to a new one once more, as the death may not be its fault, and is
    then FAILED.  No other item is affected.  Not for two threads at once.

    Args:
        verifier: judges one response; pickled to the workers.
        workers: number of processes.
        deadline: seconds per item, from the moment a worker starts on it.
        memory_mb: address space of each worker, in MiB; allocations beyond it fail.

    Raises:
        ConfigError: a value out of range, or a verifier that cannot be sent to another process.
    """

    def __init__(self, verifier: Verifier, workers: int = 2, deadline: float = 10.0, memory_mb: int = 2048) -> None:
        if workers < 1:
            raise ConfigError(f"VerifierPool.workers must be at least 1, got {workers}")
        if not 0 < deadline < float("inf"):
            raise ConfigError(f"VerifierPool.deadline must be a positive number of seconds, got {deadline}")
        if memory_mb < 256:
            raise ConfigError(f"VerifierPool.memory_mb must be at least 256 (Python with SymPy takes that), got {memory_mb}")
        self.verifier = verifier
        self.workers = workers
        self.deadline = deadline
        self.memory_mb = memory_mb
        self._pickled = _pickle_verifier(verifier)
        self._running: list[WorkerProcess] = []
        self._owner = os.getpid()
        self._finalizer: weakref.finalize | None = None

    def judge(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict per (problem, response), in order.

        Raises:
            ConfigError: the verifier could not be loaded in a worker.
            RolloutError: workers keep dying before they judge anything.
        """
        return self._run([Item(problem, response) for problem, response in pairs])

    def check(self, problems: Sequence[Problem]) -> list[Verdict]:
        """``Verifier.check`` on each problem, in order: CORRECT, or FAILED or TIMED_OUT with the reason in ``detail``."""
        return self._run([Item(problem, None) for problem in problems])

    def close(self) -> None:
        """Kill the workers.  Safe to call twice; a later ``judge`` starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in self._running]

    def _run(self, items: list[Item]) -> list[Verdict]:
        if not items:
            return []
        if self._owner != os.getpid():  # after a fork: the workers are the other process's
            for worker in self._running:
                worker.forget()
            self._running, self._owner, self._finalizer = [], os.getpid(), None
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _kill_all, self._running, self._owner)
        try:
            return _Round(self, items).verdicts()
        except BaseException:
            self.close()  # replies may be under way that belong to no later call
            raise

    def _spawn(self) -> None:
        self._running.append(WorkerProcess(Setup(self._pickled, list(sys.path), os.getpid(), self.deadline, self.memory_mb)))


class _Round:
    """One call of the pool: which items are waiting, which worker has which, and what has come back."""

    def __init__(self, pool: VerifierPool, items: list[Item]) -> None:
        self.pool = pool
        self.running = pool._running
        self.items = items
        self.results: dict[int, Verdict] = {}
        self.waiting = deque(range(len(items)))
        self.retried: set[int] = set()
        self.losses = 0  # workers lost since the last verdict

    def verdicts(self) -> list[Verdict]:
        while unjudged := len(self.items) - len(self.results):
            while len(self.running) < min(self.pool.workers, unjudged):
                self.pool._spawn()
            for worker in self.running:
                if worker.state is State.IDLE and self.waiting:
                    self._give(worker)
            self._wait()
        return [self.results[number] for number in range(len(self.items))]

    def _settle(self, number: int, verdict: Verdict) -> None:
        self.results[number] = verdict
        self.losses = 0

    def _give(self, worker: WorkerProcess) -> None:
        # Batches save messages; small ones towards the end keep all workers busy.
        size = max(1, min(_MAX_BATCH, len(self.waiting) // (2 * self.pool.workers)))
        batch: dict[int, bytes] = {}
        while self.waiting and len(batch) < size and sum(map(len, batch.values())) < _MAX_BATCH_BYTES:
            number = self.waiting.popleft()
            try:
                batch[number] = pickle.dumps(self.items[number])
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                self._settle(number, Verdict(Outcome.FAILED, 0.0, detail=f"cannot be sent to a worker: {error}"))
        if batch:
            worker.give(list(batch), list(batch.values()))

    def _limit(self, worker: WorkerProcess) -> float:
        """Seconds that the worker may stay in its state."""
        if worker.state is State.IDLE:
            return math.inf
        return self.pool.deadline if worker.state is State.BUSY else _START_SECONDS

    def _wait(self) -> None:
        """Sleep until a worker has something to say or has had its time, and act on it."""
        patience = min((self._limit(worker) - worker.age for worker in self.running), default=0.0)
        with selectors.PollSelector() as selector:
            for worker in self.running:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.wants_to_write:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            # With nothing to wait for (every item failed before it was sent) there is nothing to sleep on either.
            ready = selector.select(max(0.0, patience) if patience < math.inf else 0.0)
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                key.data.write()
            else:
                self._receive(key.data)
        # After what has come: a verdict that was there in time counts, however late this process looks.
        for worker in list(self.running):
            if worker.age >= self._limit(worker):
                self._lose(worker, "no answer")

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            messages = worker.read()
            if messages is None:
                self._lose(worker, "died")
                return
            for message in messages:
                self._take(worker, message)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            self._lose(worker, f"broke the protocol: {error!r}")

    def _take(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        if "error" in message and worker.state is State.STARTING:
            raise ConfigError(
                f"the verifier {type(self.pool.verifier).__name__} cannot be loaded in a worker process: {message['error']}; "
                "its class and all it needs must be importable from a module other than __main__"
            )
        if "ready" in message and worker.state is State.STARTING:
            worker.to(State.IDLE)
        elif "began" in message and worker.state is State.SENT:
            worker.to(State.BUSY)
        elif worker.state is State.BUSY:
            verdict = decode_verdict(message)
            self._settle(worker.pending.popleft(), verdict)
            worker.to(State.BUSY if worker.pending else State.IDLE)
        else:
            raise ValueError(f"{message} while {worker.state.value}")

    def _lose(self, worker: WorkerProcess, why: str) -> None:
        """Kill a worker, settle the item it was at, and queue the rest of its batch again."""
        late = worker.age >= self._limit(worker)
        self.running.remove(worker)
        why = f"the worker {why} ({worker.kill()})"
        self.losses += 1
        if worker.state is State.BUSY:
            number = worker.pending.popleft()
            if late:
                self._settle(number, Verdict(Outcome.TIMED_OUT, 0.0, detail=f"killed after {self.pool.deadline:g} s"))
            elif number in self.retried:
                self._settle(number, Verdict(Outcome.FAILED, 0.0, detail=f"{why}, twice"))
            else:
                self.retried.add(number)
                self.waiting.appendleft(number)
        self.waiting.extendleft(reversed(worker.pending))
        if self.losses > _MAX_LOSSES * self.pool.workers:
            raise RolloutError(f"verifier workers end before they have judged anything; last: {why} while {worker.state.value}")


def _kill_all(running: list[WorkerProcess], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner is ending
        return
    while running:
        running.pop().kill()


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
