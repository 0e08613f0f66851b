"""Holds one server to what is wanted of it: that it runs, and has the trainer's weights."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path

from cppo_lightning.engines.vllm_server.client import Patience, Server, ServerAwayError
from cppo_lightning.engines.vllm_server.process import ServerProcess
from cppo_lightning.errors import ConfigError, RolloutError

_LOOK_SECONDS = 0.5


class Keeper(threading.Thread):
    """Looks after one server from a thread of rank 0, whatever the trainer is doing.

    A server of ours that ended or is wedged is started again and given the current weights; one elsewhere is given them
    when it is back.

    Args:
        server: how it is reached.
        process: the server as our child; None if it was started elsewhere.
        label: name of the weights that it starts with.
        patience: time-outs, and the number of restarts in one rollout.
    """

    def __init__(self, server: Server, process: ServerProcess | None, label: str, patience: Patience) -> None:
        super().__init__(name=f"keeper of {server.url}", daemon=True)
        self.server = server
        self._process = process
        self._patience = patience
        self._state = threading.Condition()
        self.at_work = threading.Lock()  # held by who deals with the server
        self._closing = False
        self._wanted: tuple[Path | None, str] = (None, label)
        self._confirmed: tuple[str, dict[str, int]] | None = None
        self._failure: Exception | None = None
        self._restarts = 0
        self._was_up = False
        self._seen = time.monotonic()  # when it last was as it should be

    def want(self, folder: Path, label: str, received: dict[str, int] | None = None) -> None:
        """Have the server take over the weights in ``folder``; what failed before is forgotten.

        With ``received``, the checksums that it confirmed, it has them already and gets what is in ``folder`` when it is lost.
        """
        with self._state:
            self._confirmed = None if received is None else (label, received)
            self._wanted, self._failure, self._restarts = (folder, label), None, 0
            self._seen = time.monotonic()
            self._state.notify_all()

    def check(self) -> None:
        """Raise what made the keeper give up, if it has."""
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout: float) -> dict[str, int] | None:
        """The checksums that the server confirmed for the wanted weights; None if it has not within ``timeout`` seconds.

        Raises:
            ConfigError: the server cannot be started.
            RolloutError: it refused the weights, was lost too often, or stays away.
        """
        with self._state:
            self._state.wait_for(lambda: self._confirmed is not None or self._failure is not None, timeout)
            self.check()
            return None if self._confirmed is None else self._confirmed[1]

    def run(self) -> None:
        while not self._closing:
            with self.at_work:
                try:
                    if self._failure is None:
                        self._hold()
                except ServerAwayError as lost:
                    self._lost(lost)
                except Exception as error:  # raised where the trainer waits, which a thread that ends would leave waiting
                    self._give_up(error)
            with self._state:
                self._state.wait(_LOOK_SECONDS)

    def close(self) -> None:
        """End the server if it is ours, and the thread; one that waits for a server elsewhere ends when its request does."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        if self._process is not None:
            self._process.end()  # a start or a request under way fails at once
            if self.is_alive():
                self.join()
            self._process.close()

    def _hold(self) -> None:
        """Make the server what it should be, if it is not."""
        if self._process is not None and not self._process.started:
            self._start(self._process)
        elif self._process is not None and self._process.exit_code is not None:
            raise ServerAwayError(f"{self.server.url} ended with exit code {self._process.exit_code}")
        folder, label = self._wanted
        if self._confirmed is None or self.server.label() != label:
            if folder is not None and not folder.exists():
                kept = "engine.patience.restarts above 0 keeps one"
                raise RolloutError(f"{self.server.url} lost the weights {label!r}, of which there is no copy; {kept}")
            received = self.server.load(folder, label)
            with self._state:
                if self._wanted[1] == label:
                    self._confirmed = (label, received)
                    self._state.notify_all()
        self._seen = time.monotonic()

    def _start(self, process: ServerProcess) -> None:
        process.start()
        deadline = time.monotonic() + self._patience.start
        while not self._closing and not self.server.is_up():
            if process.exit_code is not None:
                raise ServerAwayError(f"{self.server.url} ended with exit code {process.exit_code} while it was starting")
            if time.monotonic() > deadline:
                raise ServerAwayError(f"{self.server.url} was not up after {self._patience.start:g} s")
            time.sleep(_LOOK_SECONDS)
        self._was_up = True

    def _lost(self, reason: ServerAwayError) -> None:
        if self._closing:
            return
        if self._process is None:
            if time.monotonic() - self._seen > self._patience.start:
                self._give_up(RolloutError(f"{reason}, for {self._patience.start:g} s; start it again, then resume the run"))
            return
        self._process.end(grace=0)
        told = f"vLLM server {reason}; the last lines of {self._process.log}:\n{self._process.tail()}"
        if not self._was_up:
            self._give_up(ConfigError(told))
        elif self._restarts == self._patience.restarts:
            advice = "find the cause in its log, then resume the run from its last checkpoint"
            self._give_up(RolloutError(f"{told}\nIt was restarted {self._restarts} times in this rollout already: {advice}"))
        else:
            self._restarts += 1
            warnings.warn(f"{told}\nIt is started again ({self._restarts} of {self._patience.restarts})", stacklevel=1)

    def _give_up(self, error: Exception) -> None:
        with self._state:
            self._failure = error
            self._state.notify_all()
