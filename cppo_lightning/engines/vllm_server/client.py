"""One vLLM server as seen over HTTP: what it is, which weights it has, and new ones for it."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from cppo_lightning.engines.vllm_server.listener import listens_as_us
from cppo_lightning.errors import ConfigError, RolloutError

T = TypeVar("T")

_CONNECT_SECONDS = 10.0


class ServerAwayError(Exception):
    """A server that does not answer, or not with the wanted weights; it may come back."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for servers, in seconds, and how often.

    Args:
        start: for a server to be up with its model, and to take over new weights.
        stall: for a sign of life from a server that is up; then it counts as wedged.
        request: for all samples of one prompt.
        restarts: times that each server is started again in one rollout, before the run ends.
    """

    start: float = 600.0
    stall: float = 120.0
    request: float = 3600.0
    restarts: int = 3

    def __post_init__(self) -> None:
        for name in ("start", "stall", "request"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"engine.patience.{name} must be a positive number of seconds, got {getattr(self, name)}")
        if self.restarts < 0:
            raise ConfigError(f"engine.patience.restarts must be at least 0, got {self.restarts}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; other names than localhost are taken to be public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """A vLLM server that runs our guard and worker extension.

    Args:
        url: its address, for example http://10.0.0.7:8000.
        key: its API key.
        patience: time-outs.
        ours: this run started it; then, on loopback, its key goes to nobody but a process of this user.

    Raises:
        ConfigError: ``url`` is no http address.
    """

    def __init__(self, url: str, key: str, patience: Patience, ours: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"engine.urls should hold addresses such as http://10.0.0.7:8000, got {url!r}")
        self.url = url.rstrip("/")
        self._key = key
        # one of ours that binds loopback has its number in the url; "localhost" may be the name of a machine that all reach
        numbered = parts.hostname != "localhost" and is_loopback(parts.hostname)
        self._guarded = (parts.hostname, parts.port) if ours and parts.port and numbered else None
        self._patience = patience
        self._tls = httpx.create_ssl_context(trust_env=False)  # once: it takes 20 ms, and a keeper asks twice a second

    @property
    def headers(self) -> dict[str, str]:
        """What a request needs, for the next one alone: while the server is away, any user of this machine may take its port.

        Raises:
            ServerAwayError: nobody listens there, or another user does.
        """
        if self._guarded is not None and not listens_as_us(*self._guarded):
            raise ServerAwayError(f"{self.url} does not answer (no process of this user listens there)")
        return {"Authorization": f"Bearer {self._key}"}

    def is_up(self) -> bool:
        """Whether it answers at all, and its engine is well."""
        try:
            return self._send("GET", "/health", timeout=self._patience.stall).is_success
        except ServerAwayError:
            return False

    def is_open(self) -> bool:
        """Whether it lets in who has no key."""
        return self._send("POST", "/collective_rpc", {"method": "cppo_describe"}, headers={}).status_code not in (401, 403)

    def label(self) -> str:
        """Which weights it has; the answer comes from its engine, so that a wedged one gives none.

        Raises:
            ServerAwayError: no answer.
            RolloutError: an answer that is none.
        """
        response = self._send("GET", "/weight_info", timeout=self._patience.stall)
        return accepted(response, self.url, self.is_up).json()["weight_version"]

    def describe(self) -> dict[str, Any]:
        """``TakesWeights.cppo_describe``."""
        return self._call("cppo_describe")[0]

    def load(self, folder: Path | None, label: str) -> dict[str, int]:
        """Have it take over the weights in ``folder`` (None: those it has), named ``label``; the checksums of what it received.

        Raises:
            ServerAwayError: it went away.
            RolloutError: it refused them, and must not be sampled from.
        """
        received: dict[str, int] = {}
        if folder is not None:
            self._name("in between")
            received = self._received("cppo_load_weights", str(folder), label)
        self.use(label)
        return received

    def begin(self) -> None:
        """Have it expect weights through vLLM's weight-transfer API; until ``use`` it must not be sampled from."""
        self._name("in between")
        self._call("cppo_abandon_update")
        self.post("/start_weight_update")

    def finish(self) -> dict[str, int]:
        """Have it take over the weights that were sent since ``begin``; the checksums of what it received.

        Raises:
            ServerAwayError: it went away.
            RolloutError: it refused them.
        """
        self.post("/finish_weight_update")
        return self._received("cppo_received")

    def use(self, label: str) -> None:
        """Have it sample with the weights that it has, which are named ``label``."""
        self._forget_prompts()
        self._name(label)

    def workers(self) -> int:
        """How many processes share its model."""
        return accepted(self._send("GET", "/get_world_size"), self.url, self.is_up).json()["world_size"]

    def _name(self, label: str) -> None:
        self.post("/update_weight_version", {"new_version": label})

    def _received(self, method: str, *args: str) -> dict[str, int]:
        """What a worker says that it received, if all of them say the same."""
        received, *others = self._call(method, *args)
        if any(other != received for other in others):
            raise RolloutError(f"the workers of {self.url} received different weights")
        return received

    def _forget_prompts(self) -> None:
        """Empty the prefix cache, which takes until the last request that was called off has ended."""
        deadline = time.monotonic() + self._patience.stall
        while not self.post("/reset_prefix_cache")["success"]:
            if time.monotonic() > deadline:
                raise RolloutError(f"{self.url} keeps its prefix cache: something else is being sampled there all the time")
            time.sleep(0.2)

    def _call(self, method: str, *args: str) -> list[Any]:
        return self.post("/collective_rpc", {"method": method, "args": args})["results"]

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to ``body`` as JSON.

        Raises:
            ServerAwayError: it went away.
            RolloutError: it refuses.
        """
        return accepted(self._send("POST", path, body), self.url, self.is_up).json()

    def _send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float | None = None
    ) -> httpx.Response:
        limits = httpx.Timeout(timeout or self._patience.start, connect=_CONNECT_SECONDS)
        headers = self.headers if headers is None else headers
        try:
            # no proxy from the environment: what is on loopback stays there
            with httpx.Client(trust_env=False, verify=self._tls, timeout=limits) as client:
                return client.request(method, self.url + path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise ServerAwayError(f"{self.url} does not answer ({type(error).__name__}: {error})") from error


def on_each(servers: Sequence[Server], call: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """What ``call`` returns for each server, all asked at once; raises what the first that failed raises, after all calls."""
    with ThreadPoolExecutor(len(servers)) as pool:
        answers = [pool.submit(call, server, *rest) for server, *rest in zip(servers, *arguments, strict=True)]
    return [answer.result() for answer in answers]


def accepted(response: httpx.Response, url: str, is_up: Callable[[], bool]) -> httpx.Response:
    """The response, if it is a good one.

    Raises:
        ServerAwayError: the server's engine is gone.
        RolloutError: the server refuses.
    """
    if response.is_success:
        return response
    if response.status_code == 401:
        raise RolloutError(f"{url} does not accept the API key; the variable named by engine.api_key_env should hold its key")
    if response.status_code >= 500 and not is_up():
        raise ServerAwayError(f"{url} answers with {response.status_code}: {response.text[:500]}")
    raise RolloutError(f"{url}{response.request.url.path} refused with {response.status_code}: {response.text[:1000]}")
