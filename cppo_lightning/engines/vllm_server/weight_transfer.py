"""The trainer's weights on their way to servers: through a folder, or by vLLM's weight-transfer API."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cppo_lightning.engines.vllm.process_state import process_state_kept, set_environment
from cppo_lightning.engines.vllm.settings import PARALLEL, check_installed
from cppo_lightning.engines.vllm.weights import received
from cppo_lightning.engines.vllm_server.client import Patience, Server, ServerAwayError, on_each
from cppo_lightning.engines.vllm_server.weight_folder import copied, write_weights
from cppo_lightning.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.engines.vllm_server.keeper import Keeper

WAYS = ("folder", "gloo", "nccl", "ipc")
BUCKET_BYTES = 256 * 2**20
_PICKLE = "VLLM_ALLOW_INSECURE_SERIALIZATION"


class WeightTransfer(ABC):
    """A way for weights to servers; used on rank 0.

    Attributes:
        backend: the weight-transfer backend that servers must be started with; None if they need none.
    """

    backend: str | None = None

    @abstractmethod
    def send(self, weights: Iterable[tuple[str, Tensor]], keepers: Sequence[Keeper], folder: Path, label: str) -> None:
        """Give ``weights`` to the keepers' servers, or have each keeper give its server what is then in ``folder``.

        Raises:
            RolloutError: a server refused them or was lost, or they could not be written.
        """


class ThroughFolder(WeightTransfer):
    """Weights are written once, and each server reads them whenever it needs them: it may be started again."""

    def send(self, weights: Iterable[tuple[str, Tensor]], keepers: Sequence[Keeper], folder: Path, label: str) -> None:
        write_weights(weights, folder, label)
        for keeper in keepers:
            keeper.want(folder, label)


class ByVLLM(WeightTransfer):
    """Weights go from rank 0's memory into the servers' by vLLM's weight-transfer API, to all servers at once.

    They go in buckets, of which one is held besides the parameter in hand.  With ``patience.restarts`` they are written into
    the folder as well, for servers that are lost later, or while weights go to them; without, a lost server ends the run.

    nccl and ipc are vLLM's own and have not been run; gloo takes the same path, and the tests run it.

    Args:
        way: "gloo", "nccl" or "ipc".
        dtype: in which they are sent: the servers'.
        bucket_bytes: size of a bucket, at least that of the largest parameter.
        patience: ``stall`` bounds the wait for one tensor, with gloo.
    """

    def __init__(self, way: str, dtype: torch.dtype, bucket_bytes: int, patience: Patience) -> None:
        self._way, self._dtype, self._bucket_bytes, self._patience = way, dtype, bucket_bytes, patience
        self.backend = f"cppo_{way}"

    def send(self, weights: Iterable[tuple[str, Tensor]], keepers: Sequence[Keeper], folder: Path, label: str) -> None:
        sent: dict[str, int] = {}
        passing = received(weights, self._dtype, sent)
        if self._patience.restarts:
            passing = copied(passing, folder, label)
        servers = [keeper.server for keeper in keepers]
        with ExitStack() as hands_off:
            for keeper in keepers:
                hands_off.enter_context(keeper.at_work)
            try:
                self._stream(passing, sent, servers)
                on_each(servers, lambda server: server.use(label))
                arrived = sent
            except ServerAwayError as lost:
                if not self._patience.restarts:
                    advice = "resume the run from its last checkpoint, or let engine.patience.restarts be above 0"
                    raise RolloutError(f"{lost}, while weights went to it; {advice}") from lost
                deque(passing, maxlen=0)  # the folder gets the rest
                arrived = None
            for keeper in keepers:
                keeper.want(folder, label, arrived)

    def _stream(self, weights: Iterable[tuple[str, Tensor]], sent: Mapping[str, int], servers: Sequence[Server]) -> None:
        """Have every server take over ``weights``, whose checksums are in ``sent`` once they have gone."""
        set_environment()
        with process_state_kept():
            from cppo_lightning.engines.vllm_server.transfer_trainer import stream

        for found in stream(weights, servers, self._way, self._bucket_bytes, self._patience.stall):
            if found != sent:
                wrong = sorted(name for name in sent.keys() | found.keys() if sent.get(name) != found.get(name))
                raise RolloutError(f"a server received other weights than were sent: {', '.join(wrong[:5])}")


def transfer_by(way: str, dtype: torch.dtype, parameters: Iterable[Tensor], patience: Patience) -> WeightTransfer:
    """The way named ``way`` (of ``WAYS``) for a model with ``parameters`` to servers that compute in ``dtype``.

    Raises:
        ConfigError: ipc under several ranks.
    """
    if way == "folder":
        return ThroughFolder()
    if way == "ipc" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError("engine.weight_transfer ipc is for one rank, this run has more; take folder, or VLLMEngine")
    largest = max(parameter.numel() for parameter in parameters) * dtype.itemsize
    return ByVLLM(way, dtype, max(BUCKET_BYTES, largest), patience)


def check_way(way: str, elsewhere: bool, engine_args: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if weights cannot go by ``way`` to servers, which are ``elsewhere`` or started by this run."""
    key = "engine.weight_transfer"
    if way not in WAYS:
        raise ConfigError(f"{key} must be one of {', '.join(WAYS)}, got {way!r}")
    if way != "folder":
        check_installed(f"VLLMServerEngine with {key} {way}")
    if way in ("nccl", "ipc") and not torch.cuda.is_available():
        raise ConfigError(f"{key} {way} needs CUDA, which this machine has not; take folder or gloo")
    if way == "nccl" and not elsewhere:
        raise ConfigError(
            f"{key} nccl is for servers elsewhere (engine.urls): those started here share the trainer's GPU; take ipc"
        )
    if way == "ipc":
        _check_ipc(key, elsewhere, engine_args)


def _check_ipc(key: str, elsewhere: bool, engine_args: Mapping[str, Any]) -> None:
    if elsewhere:
        raise ConfigError(f"{key} ipc shares a GPU's memory, which servers elsewhere (engine.urls) cannot; take nccl")
    for name in PARALLEL:
        if engine_args.get(name, 1) != 1:
            raise ConfigError(
                f"{key} ipc reaches servers on rank 0's GPU alone: engine.engine_args.{name} must be 1, got {engine_args[name]}"
            )
    if os.environ.get(_PICKLE) != "1":
        raise ConfigError(
            f"{key} ipc sends handles of GPU memory as pickles, to servers on this machine, with their key; set {_PICKLE}=1 if "
            "they may read them, or take folder"
        )
