"""The processes of a verifier pool as those see them who start and end them."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cppo_lightning.verifiers.channel import Channel
from cppo_lightning.verifiers.protocol import MAX_REPLY, Setup
from cppo_lightning.verifiers.worker import die_with_parent

_END_SECONDS = 5.0  # for a supervisor to kill its workers

# Verifiers read what a model wrote and need no credentials.
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}


class SupervisorProcess:
    """The supervisor as its pool sees it: neither a fork of this process nor run with its ``__main__``.

    Attributes:
        channel: to and from it, never blocking.
        loaded: whether it has said that the verifier is there.
        heard: ``time.monotonic()`` of its last message.
    """

    def __init__(self, setup: Setup) -> None:
        # One thread of OpenMP and BLAS each: their stacks on a machine with many cores would eat the memory limit.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
        path = os.pathsep.join(entry or os.getcwd() for entry in setup.sys_path)
        ours, theirs = socket.socketpair()
        with theirs:
            # Unbuffered, so that nothing printed while loading is printed again by every fork.
            command = [sys.executable, "-u", "-P", "-m", "cppo_lightning.verifiers.supervisor", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=_without_secrets(os.environ) | threads | {"PYTHONPATH": path},
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        ours.setblocking(False)
        self.channel = Channel(ours, MAX_REPLY)
        self.channel.send(pickle.dumps(setup))
        self.loaded = False
        self.heard = time.monotonic()

    def end(self) -> int:
        """Have it end its workers and itself; how it ended, as ``Popen.returncode`` does."""
        if self.loaded:
            try:
                self.channel.connection.shutdown(socket.SHUT_RDWR)
                self._process.wait(_END_SECONDS)
            except (OSError, subprocess.TimeoutExpired):  # gone, or stopped by someone: the kernel ends its workers with it
                self._process.kill()
        else:
            self._process.kill()
        self.channel.close()
        return self._process.wait()

    def forget(self) -> None:
        """Close this process's end without touching the supervisor, which belongs to another process."""
        self.channel.close()
        self._process.returncode = 0


@dataclass
class Task:
    """An item on its way to a verdict."""

    number: int
    payload: bytes
    tries: int = 0  # workers that died over it
    faults: int = 0  # of these, by anything but a SIGKILL from outside


class State(Enum):
    IDLE = "idle"
    SENT = "sent"  # a batch is on its way to it
    BUSY = "busy"  # judging the first task of ``pending``


class WorkerProcess:
    """A worker as its supervisor sees it: a fork.

    Args:
        serve: what it does with its channel.
        inherited: the supervisor's channels, which are none of its business.

    Attributes:
        pending: what it was given and has not judged.
        used: whether it has judged anything.
    """

    def __init__(self, serve: Callable[[Channel], None], inherited: Sequence[Channel]) -> None:
        ours, theirs = socket.socketpair()
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                # A session of its own, so that it is killed together with whatever a verifier has started.
                os.setsid()
                die_with_parent(supervisor)
                ours.close()
                for channel in inherited:
                    channel.close()
                serve(Channel(theirs))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(1)
        theirs.close()
        ours.setblocking(False)
        self.channel = Channel(ours, MAX_REPLY)
        self.pending: deque[Task] = deque()
        self.used = False
        self.to(State.IDLE)

    @property
    def age(self) -> float:
        """Seconds since it entered its state or gave its last verdict."""
        return time.monotonic() - self.since

    def to(self, state: State) -> None:
        """Enter ``state`` and restart the clock."""
        self.state, self.since = state, time.monotonic()

    def give(self, tasks: Sequence[Task]) -> None:
        """Hand a batch to an idle worker."""
        self.pending.extend(tasks)
        self.channel.send(pickle.dumps([task.payload for task in tasks]))
        self.channel.write()
        self.to(State.SENT)

    def kill(self) -> int:
        """End the process and all that it started; its exit status, or the signal that ended it, negative."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # not yet, or no longer, the leader of a session
            os.kill(self.pid, signal.SIGKILL)
        self.channel.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def in_words(code: int) -> str:
    """An exit status as ``Popen.returncode`` has it."""
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
