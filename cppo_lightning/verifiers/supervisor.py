"""Between a pool and its workers, run as ``python -m cppo_lightning.verifiers.supervisor FD``.

It imports nothing but the standard library, the verifier, and what that imports, has one thread, and never runs a verifier:
so its workers are clean forks, made in milliseconds, and no work of the trainer delays a deadline.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
from collections import deque
from typing import Any

from cppo_lightning.verifiers import memory
from cppo_lightning.verifiers.base import Outcome, Verdict, Verifier
from cppo_lightning.verifiers.channel import Channel
from cppo_lightning.verifiers.process import State, Task, WorkerProcess, in_words
from cppo_lightning.verifiers.protocol import LOAD_SECONDS, OUT_OF_MEMORY, Setup, decode_verdict, encode_verdict, split_number
from cppo_lightning.verifiers.worker import describe, die_with_parent, serve

_MAX_FAULTS = 2  # workers that an item may bring down
_MAX_TRIES = 8  # and with those that someone else killed
_MAX_BARREN = 16  # workers lost in a row while they judged nothing
_SENT_SECONDS = 30.0  # for a worker to take a batch
_MAX_BATCH = 64  # items
_MAX_BATCH_BYTES = 1 << 20
_ROOM_MB = 64  # of address space that a verifier must have left to work in
_LOOK_SECONDS = 1.0  # between looks whether the pool's process is there


class Supervisor:
    """Which items are waiting, which worker has which, and who is to be killed."""

    def __init__(self, setup: Setup, verifier: Verifier, channel: Channel) -> None:
        self.setup = setup
        self.verifier = verifier
        self.channel = channel
        self.waiting: deque[Task] = deque()
        self.running: list[WorkerProcess] = []
        self.barren = 0
        self._reported: list[int] = []

    def run(self) -> None:
        """Work until the pool or its process has gone, or workers end before they judge anything."""
        try:
            # The channel's end is not enough: a fork of the pool's process may hold a copy of it.
            while os.getppid() == self.setup.parent and self.barren <= _MAX_BARREN and self._turn():
                pass
            if self.barren > _MAX_BARREN:  # say so before leaving
                self.channel.connection.setblocking(True)
                self.channel.write()
        finally:
            for worker in self.running:
                worker.kill()

    def _turn(self) -> bool:
        """Sleep until something is to be done, and do it.  False once the pool has gone."""
        self._assign()
        self.channel.write()
        with selectors.PollSelector() as selector:
            for owner, channel in [(None, self.channel), *((worker, worker.channel) for worker in self.running)]:
                write = selectors.EVENT_WRITE if channel.wants_to_write else 0
                selector.register(channel, selectors.EVENT_READ | write, owner)
            ready = selector.select(max(0.0, min([_LOOK_SECONDS, *map(self._time_left, self.running)])))
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                key.fileobj.write()  # pyright: ignore[reportAttributeAccessIssue]
            if events & selectors.EVENT_READ:
                if key.data is not None:
                    self._listen(key.data)
                elif not self._accept():
                    return False
        # After what has come: a verdict that was there in time counts, however late this process looks.
        for worker in list(self.running):
            if self._time_left(worker) <= 0:
                self._lose(worker)
        return True

    def _accept(self) -> bool:
        messages = self.channel.read()
        self.waiting.extend(Task(*split_number(message)) for message in messages or ())
        return messages is not None

    def _assign(self) -> None:
        busy = sum(worker.state is not State.IDLE for worker in self.running)
        while len(self.running) < min(self.setup.workers, busy + len(self.waiting)):
            self._fork()
        for worker in list(self.running):
            if worker.state is State.IDLE and self.waiting:
                if worker.used and self.waiting[0].faults:
                    # Memory that others have filled must not be what an item fails by.
                    self.running.remove(worker)
                    worker.kill()
                    worker = self._fork()
                worker.give(self._batch())
        pids = [worker.pid for worker in self.running]
        if pids != self._reported:
            self._reported = pids
            self._tell({"pids": pids})

    def _fork(self) -> WorkerProcess:
        inherited = [self.channel, *(worker.channel for worker in self.running)]
        worker = WorkerProcess(lambda channel: serve(channel, self.verifier, self.setup), inherited)
        self.running.append(worker)
        return worker

    def _batch(self) -> list[Task]:
        # Batches save messages; small ones towards the end keep all workers busy.
        size = max(1, min(_MAX_BATCH, len(self.waiting) // (2 * self.setup.workers)))
        batch = [self.waiting.popleft()]
        room = _MAX_BATCH_BYTES - len(batch[0].payload)
        while self.waiting and len(batch) < size and room > 0 and not (batch[0].faults or self.waiting[0].faults):
            batch.append(self.waiting.popleft())
            room -= len(batch[-1].payload)
        return batch

    def _time_left(self, worker: WorkerProcess) -> float:
        """Seconds that the worker may stay in its state."""
        if worker.state is State.IDLE:
            return float("inf")
        return (self.setup.deadline if worker.state is State.BUSY else _SENT_SECONDS) - worker.age

    def _listen(self, worker: WorkerProcess) -> None:
        try:
            messages = worker.channel.read()
            if messages is None:
                self._lose(worker)
                return
            for message in messages:
                self._take(worker, message)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._lose(worker, f"broke the protocol: {error!r}"[:1000])

    def _take(self, worker: WorkerProcess, message: bytes) -> None:
        said = json.loads(message)
        if worker.state is State.BUSY:
            decode_verdict(said)
            self._settle(worker.pending.popleft(), message)
            worker.used = True
            worker.to(State.BUSY if worker.pending else State.IDLE)
        elif worker.state is State.SENT and said == {"began": True}:
            worker.to(State.BUSY)
        else:
            raise ValueError(f"{str(said)[:200]} while {worker.state.value}")

    def _lose(self, worker: WorkerProcess, fault: str = "") -> None:
        """Kill a worker, settle the item it was at, and queue the rest of its batch again."""
        late = self._time_left(worker) <= 0
        self.running.remove(worker)
        code = worker.kill()
        if worker.state is State.BUSY:
            task = worker.pending.popleft()
            task.tries += 1
            task.faults += bool(fault) or code != -signal.SIGKILL
            if late:
                self._fail(task, Outcome.TIMED_OUT, f"killed after {self.setup.deadline:g} s")
            elif code == OUT_OF_MEMORY and not worker.used:  # with all the memory to itself
                self._fail(task, Outcome.FAILED, f"memory limit of {self.setup.memory_mb} MiB reached")
            elif task.faults >= _MAX_FAULTS or task.tries >= _MAX_TRIES:
                self._fail(task, Outcome.FAILED, f"the worker {fault or f'died ({in_words(code)})'}, {task.tries} times")
            else:
                self.waiting.appendleft(task)
        else:
            self.barren += 1
            if self.barren > _MAX_BARREN:
                why = f"verifier workers end before they have judged anything; last: {fault or in_words(code)}"
                self._tell({"fatal": f"{why} while {worker.state.value}"})
        self.waiting.extendleft(reversed(worker.pending))

    def _fail(self, task: Task, outcome: Outcome, detail: str) -> None:
        self._settle(task, encode_verdict(Verdict(outcome, 0.0, detail=detail)))

    def _settle(self, task: Task, verdict: bytes) -> None:
        self.barren = 0
        self.channel.send(b'{"item": %d, "verdict": %b}' % (task.number, verdict))

    def _tell(self, message: dict[str, Any]) -> None:
        self.channel.send(json.dumps(message).encode())


def load(setup: Setup) -> Verifier:
    """The verifier, ready to work and to be forked.

    Raises:
        Exception: whatever the verifier's own code raises.
        RuntimeError: it has started threads, or its libraries leave no memory to work in.
    """
    die_with_parent(setup.parent)
    signal.alarm(LOAD_SECONDS)
    sys.path[:] = setup.sys_path
    verifier: Verifier = pickle.loads(setup.verifier)
    verifier.prepare()
    signal.alarm(0)
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:])
        raise RuntimeError(
            f"it has started threads ({names}), which are not there in forked workers; start them when first called"
        )
    if setup.memory_mb < memory.taken() + _ROOM_MB:
        raise RuntimeError(
            f"its libraries take {memory.taken()} MiB of address space; set VerifierPool.memory_mb = {setup.memory_mb} "
            f"to at least {memory.taken() + _ROOM_MB}"
        )
    # From here on the end of the channel tells that the pool has gone, and there is time to kill what verifiers have started.
    die_with_parent(setup.parent, wanted=False)
    return verifier


def main() -> None:
    # A batch system signals every process of a job, and the trainer may want to judge to the end of its step.  A handler, since
    # what is ignored stays so in what a verifier starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    setup: Setup = pickle.loads(next(channel.messages()))
    answer: dict[str, Any] = {"ready": True}
    verifier = None
    try:
        verifier = load(setup)
    except Exception as error:
        answer = {"error": describe(error)}
    channel.send(json.dumps(answer).encode())
    channel.write()
    if verifier is not None:
        channel.connection.setblocking(False)
        gc.freeze()  # a collection in a fork would copy every page that it looks at
        Supervisor(setup, verifier, channel).run()
    os.killpg(0, signal.SIGKILL)  # this process, and what loading the verifier has started


if __name__ == "__main__":
    main()
