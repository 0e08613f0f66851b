"""The thread of a pool: items go to the supervisor, and its verdicts to the futures that wait for them."""

from __future__ import annotations

import json
import pickle
import selectors
import signal
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.verifiers.base import Outcome, Verdict
from cppo_lightning.verifiers.process import SupervisorProcess, in_words
from cppo_lightning.verifiers.protocol import LOAD_SECONDS, Item, Setup, decode_verdict, number_item

_MAX_LOSSES = 8  # supervisors killed in a row without a verdict
_SILENCE = 30.0  # seconds past the deadline after which a supervisor is taken to be stuck
_IN_FLIGHT = 4 << 20  # bytes sent and not judged; the rest waits here, where the responses are anyway


@dataclass
class _Task:
    item: Item
    future: Future[Verdict]
    size: int = 0  # bytes, once sent


class Dispatcher:
    """Runs a supervisor for one pool, until it is closed or an error ends it and all futures that wait.

    A thread, so that responses are judged while the caller's thread sits in a long call.  The supervisor starts with the first
    item, and another one when it is killed.

    Args:
        setup: what the supervisor is told.
        name: of the verifier, for messages.
        max_pending: items that may wait for their verdicts.

    Attributes:
        pids: process ids of the workers.
        ended: whether it takes no more items.
    """

    def __init__(self, setup: Setup, name: str, max_pending: int) -> None:
        self.pids: list[int] = []
        self.ended = False
        self._setup = setup
        self._name = name
        self._slots = threading.Semaphore(max_pending)
        self._lock = threading.Lock()
        self._waiting: deque[_Task] = deque()
        self._sent: dict[int, _Task] = {}
        self._numbers = count()
        self._in_flight = 0
        self._losses = 0
        self._supervisor: SupervisorProcess | None = None
        self._closing = False
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def put(self, item: Item, future: Future[Verdict]) -> bool:
        """Have an item judged; waits while ``max_pending`` items have no verdict.  False if this has ended."""
        self._slots.acquire()
        with self._lock:
            if not self.ended:
                future.add_done_callback(lambda _: self._slots.release())
                self._waiting.append(_Task(item, future))
                self._wake()
                return True
        self._slots.release()
        return False

    def close(self) -> None:
        """End all processes and cancel what has no verdict.  Safe to call twice."""
        self._closing = True
        with self._lock:
            if not self.ended:
                self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def forget(self) -> None:
        """After a fork, in the child: let go of what belongs to the parent."""
        self._bell.close()
        self._ring.close()
        if self._supervisor is not None:
            self._supervisor.forget()

    def _wake(self) -> None:
        try:
            self._ring.send(b"\0")
        except BlockingIOError:  # full of calls that have not been answered, which will do
            return

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while not self._closing:
                self._turn()
        except Exception as raised:  # whatever it is, those who wait must know
            error = raised
        with self._lock:
            self.ended = True
            self._bell.close()
            self._ring.close()
        if self._supervisor is not None:
            self._supervisor.end()
        self.pids = []
        for task in (*self._sent.values(), *self._waiting):
            if error is None:
                task.future.cancel()
            elif task.future.set_running_or_notify_cancel():
                task.future.set_exception(error)

    def _turn(self) -> None:
        """Sleep until something is to be done, and do it."""
        if self._supervisor is None and self._waiting:
            self._supervisor = SupervisorProcess(self._setup)
        self._fill()
        with selectors.PollSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            if self._supervisor is not None:
                write = selectors.EVENT_WRITE if self._supervisor.channel.wants_to_write else 0
                selector.register(self._supervisor.channel, selectors.EVENT_READ | write)
            ready = selector.select(self._patience())
        if not ready and self._patience() == 0:
            self._lose("is stuck")
        for key, events in ready:
            if key.fileobj is self._bell:
                self._bell.recv(1 << 16)
                continue
            assert self._supervisor is not None
            if events & selectors.EVENT_WRITE:
                self._supervisor.channel.write()
            if events & selectors.EVENT_READ:
                self._receive(self._supervisor)

    def _patience(self) -> float | None:
        """Seconds until the supervisor must have said something; None while nothing is expected of it."""
        if self._supervisor is None or (self._supervisor.loaded and not self._sent):
            return None
        expected = self._setup.deadline if self._supervisor.loaded else LOAD_SECONDS
        return max(0.0, self._supervisor.heard + expected + _SILENCE - time.monotonic())

    def _fill(self) -> None:
        supervisor = self._supervisor
        if supervisor is None or not supervisor.loaded:
            return
        if not self._sent:
            supervisor.heard = time.monotonic()
        while self._waiting and self._in_flight < _IN_FLIGHT:
            task = self._waiting.popleft()
            if task.future.cancelled():
                continue
            try:
                payload = pickle.dumps(task.item)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                _settle(task, Verdict(Outcome.FAILED, 0.0, detail=f"cannot be sent to a worker: {error}"))
                continue
            number, task.size = next(self._numbers), len(payload)
            self._sent[number] = task
            self._in_flight += task.size
            supervisor.channel.send(number_item(number, payload))
        supervisor.channel.write()

    def _receive(self, supervisor: SupervisorProcess) -> None:
        messages = supervisor.channel.read()
        if messages is None:
            self._lose("ended")
            return
        supervisor.heard = time.monotonic()
        for message in messages:
            self._take(supervisor, json.loads(message))

    def _take(self, supervisor: SupervisorProcess, message: dict[str, Any]) -> None:
        if "item" in message:
            task = self._sent.pop(message["item"])
            self._in_flight -= task.size
            self._losses = 0
            _settle(task, decode_verdict(message["verdict"]))
        elif "pids" in message:
            self.pids = message["pids"]
        elif "ready" in message:
            supervisor.loaded = True
        elif "error" in message:
            raise ConfigError(f"the verifier {self._name} cannot be loaded in a worker process: {message['error']}")
        else:
            raise RolloutError(message["fatal"])

    def _lose(self, how: str) -> None:
        """Go on with another supervisor, unless the one that is lost was not simply killed."""
        assert self._supervisor is not None
        loaded, code = self._supervisor.loaded, self._supervisor.end()
        self._supervisor, self.pids = None, []
        self._waiting.extendleft(reversed(self._sent.values()))
        self._sent.clear()
        self._in_flight = 0
        self._losses += 1
        if code != -signal.SIGKILL or self._losses > _MAX_LOSSES:
            doing = "working" if loaded else f"loading the verifier {self._name}"
            times = f" {self._losses} times" if self._losses > 1 else ""
            raise RolloutError(f"the process above the verifier's workers {how}{times} while {doing}: {in_words(code)}")


def _settle(task: _Task, verdict: Verdict) -> None:
    if task.future.set_running_or_notify_cancel():
        task.future.set_result(verdict)
