"""Rank 0's side of several vLLM servers: they start together, take over weights together, and end together."""

from __future__ import annotations

import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from cppo_lightning.engines.vllm.settings import check_version
from cppo_lightning.engines.vllm_server.client import Patience, Server
from cppo_lightning.engines.vllm_server.keeper import Keeper
from cppo_lightning.engines.vllm_server.process import ServerProcess, how_to_serve
from cppo_lightning.engines.vllm_server.weight_transfer import WeightTransfer
from cppo_lightning.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from torch import Tensor

_PROGRESS_SECONDS = 15.0


class Fleet:
    """Servers with a keeper each, and the folder through which weights go to them.

    Args:
        places: for each server its process, or the url of one that runs elsewhere.
        key: their API key.
        folder: made here, and deleted at the end; holds no more than the weights of two versions.
        label: name of the weights that servers start with.
        patience: time-outs.
        transfer: the way in which weights go to them.
    """

    def __init__(
        self,
        places: Sequence[ServerProcess | str],
        key: str,
        folder: Path,
        label: str,
        patience: Patience,
        transfer: WeightTransfer,
    ) -> None:
        self._folder = folder
        self._transfer = transfer
        self._current: Path | None = None
        self._keepers: list[Keeper] = []
        for place in places:
            process = place if isinstance(place, ServerProcess) else None
            url = place if isinstance(place, str) else f"http://{_reached(place.address)}:{place.port}"
            self._keepers.append(Keeper(Server(url, key, patience, ours=process is not None), process, label, patience))

    @property
    def urls(self) -> list[str]:
        return [keeper.server.url for keeper in self._keepers]

    def start(self) -> None:
        """Start the keepers, and wait until every server is up.

        Raises:
            ConfigError: a server ended while it was starting, or was not up in time.
            RolloutError: a server elsewhere does not answer.
        """
        for keeper in self._keepers:
            keeper.start()
        self._confirmed("to start")

    def limits(self, model: str, dtype: str, max_top_logprobs: int, max_model_len: int | None) -> dict[str, int]:
        """The smallest ``max_model_len`` and ``max_num_seqs`` of all servers.

        Raises:
            ConfigError: a server lets in who has no key, or has other settings than these.
        """
        limits = []
        for server in (keeper.server for keeper in self._keepers):
            advice = f"; start it with: {how_to_serve(model, max_top_logprobs)} --dtype {dtype}"
            if server.is_open():
                raise ConfigError(f"the server {server.url} lets in who has no key{advice}")
            found = server.describe()
            check_version(found["version"], "VLLMServerEngine", server.url)
            if self._transfer.backend not in (None, found["weight_transfer"]):
                flag = f"""--weight-transfer-config '{{"backend": "{self._transfer.backend}"}}'"""
                raise ConfigError(f"the server {server.url} has another engine.weight_transfer{advice} {flag}")
            for name, right in (("dtype", dtype), ("logprobs_mode", "processed_logprobs"), ("takes_seeds", True)):
                if found[name] != right:
                    raise ConfigError(f"the server {server.url} has {name} {found[name]}, not {right}{advice}")
            for name, least in (("max_logprobs", max_top_logprobs), ("max_model_len", max_model_len or 0)):
                if found[name] < least:
                    raise ConfigError(f"the server {server.url} has {name} {found[name]}, less than {least}{advice}")
            limits.append(found)
        return {name: min(found[name] for found in limits) for name in ("max_model_len", "max_num_seqs")}

    def load(self, weights: Iterator[tuple[str, Tensor]], label: str) -> dict[str, int]:
        """Have every server take over ``weights`` under ``label``; the checksums that all of them confirm.

        ``weights`` is read to its end even if this fails: other ranks take part in gathering each parameter.

        Raises:
            RolloutError: they could not be sent, or a server refused them, stays away or was lost too often.
        """
        folder = self._folder / label.replace("/", "-")
        try:
            self._transfer.send(weights, self._keepers, folder, label)
        except Exception:
            deque(weights, maxlen=0)
            raise
        first, *others = self._confirmed("to take over weights")
        if any(received != first for received in others):
            raise RolloutError("the servers received different weights")
        if self._current is not None:
            shutil.rmtree(self._current)
        self._current = folder if folder.exists() else None
        return first

    def check(self) -> None:
        """Raise what made a keeper give up, if one has."""
        for keeper in self._keepers:
            keeper.check()

    def close(self) -> None:
        with ThreadPoolExecutor() as together:  # a wedged server takes seconds
            list(together.map(Keeper.close, self._keepers))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _confirmed(self, what: str) -> list[dict[str, int]]:
        """What each server confirms for the weights that it should have; says now and then who is waited for."""
        since = time.monotonic()
        confirmed = []
        for keeper in self._keepers:
            while (received := keeper.wait(_PROGRESS_SECONDS)) is None:
                rank_zero_info(f"waiting for vLLM server {keeper.server.url} {what}: {time.monotonic() - since:.0f} s")
            confirmed.append(received)
        return confirmed


def _reached(address: str) -> str:
    """The name in urls for a server that binds ``address``."""
    if address in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{address}]" if ":" in address else address
