"""One worker process of a verifier pool, as its parent sees it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from enum import Enum
from typing import Any

from cppo_lightning.verifiers.protocol import Setup, write_frame

_MAX_REPLY = 1 << 20  # bytes without a line end after which a worker is taken to be broken


class State(Enum):
    STARTING = "starting"  # until it answers "ready"
    IDLE = "idle"
    SENT = "sent"  # a batch is on its way to it
    BUSY = "busy"  # judging the first item of ``pending``


class WorkerProcess:
    """A child with its pipes, never blocking the parent.

    Attributes:
        pending: the items it was given and has not judged, by number.
        since: ``time.monotonic()`` of its last change of state or last verdict.
    """

    def __init__(self, setup: Setup) -> None:
        # One thread of OpenMP and BLAS each: their stacks on a machine with many cores would eat the memory limit.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
        path = os.pathsep.join(entry or os.getcwd() for entry in setup.sys_path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cppo_lightning.verifiers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads | {"PYTHONPATH": path},
            bufsize=0,
            # Out of reach of the terminal's Ctrl-C, and killed together with whatever a verifier has started.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self.pid = self._process.pid
        self.pending: deque[int] = deque()
        self.state = State.STARTING
        self.since = time.monotonic()
        self._read = bytearray()
        self._unwritten = memoryview(write_frame(pickle.dumps(setup)))

    @property
    def age(self) -> float:
        """Seconds since the clock was restarted."""
        return time.monotonic() - self.since

    def to(self, state: State) -> None:
        """Enter ``state`` and restart the clock."""
        self.state, self.since = state, time.monotonic()

    def give(self, items: list[int], payloads: list[bytes]) -> None:
        """Hand a batch to an idle worker; ``write`` sends it."""
        self.pending.extend(items)
        self._unwritten = memoryview(write_frame(pickle.dumps(payloads)))
        self.to(State.SENT)

    @property
    def wants_to_write(self) -> bool:
        return len(self._unwritten) > 0

    def write(self) -> None:
        """Send as much as the pipe takes."""
        try:
            self._unwritten = self._unwritten[os.write(self.stdin.fileno(), self._unwritten) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the worker has gone, which ``read`` will tell after the worker's last words
            self._unwritten = memoryview(b"")

    def read(self) -> list[dict[str, Any]] | None:
        """The replies that have come; None once the worker has gone.

        Raises:
            ValueError: something that is not a line with a JSON object.
        """
        try:
            received = os.read(self.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return []
        if not received:
            return None
        self._read += received
        *lines, rest = self._read.split(b"\n")
        if len(rest) > _MAX_REPLY:
            raise ValueError(f"a reply of more than {_MAX_REPLY} bytes")
        self._read = bytearray(rest)
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a reply that is not a JSON object")
        return messages

    def kill(self) -> str:
        """End the process and all that it started; how it ended, in words."""
        if self._process.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # not yet, or no longer, the leader of a session
                self._process.kill()
        code = self._process.wait()
        self.stdin.close()
        self.stdout.close()
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def forget(self) -> None:
        """Close this process's ends of the pipes without touching the worker, which belongs to another process."""
        self.stdin.close()
        self.stdout.close()
        self._process.returncode = 0
