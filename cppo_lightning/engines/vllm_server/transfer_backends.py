"""Backends of vLLM's weight-transfer API, for both ends; needs vLLM.

vLLM brings nccl and ipc, which need CUDA.  gloo is ours: the same calls over TCP, for any device.  In a worker each keeps a
checksum of every parameter that goes into the model.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import distributed
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from cppo_lightning.engines.checksums import checksum
from cppo_lightning.engines.vllm.settings import repack_output_head

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join: where rank 0 listens, its server's first rank, the number of ranks, the longest wait."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    seconds: float


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """What rank 0 needs: where to listen, the number of ranks, the longest wait for one tensor in seconds."""

    backend: ClassVar[str] = "cppo_gloo"

    master_address: str
    master_port: int
    world_size: int
    seconds: float


class GlooGroup:
    """Processes that get tensors from rank 0 over TCP, besides whatever process groups they are in.

    Raises:
        RuntimeError: not all of them came, one went away, or one made no progress for ``seconds``.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, seconds: float) -> None:
        wait, gloo = timedelta(seconds=seconds), cast("Any", distributed).ProcessGroupGloo
        place = ipaddress.ip_address(address)
        listening = {}
        if rank == 0:  # the store itself would listen on every interface
            family = socket.AF_INET if place.version == 4 else socket.AF_INET6
            listening["master_listen_fd"] = socket.create_server((address, port), family=family).detach()
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, size, is_master=rank == 0, timeout=wait, wait_for_workers=False, **listening
        )
        options = gloo._Options()
        options._timeout = wait
        # on one machine, what is sent does not leave it
        options._devices = [gloo.create_device(hostname=address) if place.is_loopback else gloo.create_default_device()]
        self._group = gloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Send ``tensor``, contiguous and on the CPU, from rank 0; elsewhere it is overwritten."""
        if self._group is None:
            raise RuntimeError("this process has left the group")
        self._group.broadcast(tensor, 0).wait()

    def destroy(self) -> None:
        """Leave; the others' broadcasts fail, most of them at once."""
        self._group = None


class _Listening:
    """Stands in for the model while weights come in."""

    def __init__(self, load: Callable[[Iterable[tuple[str, Tensor]]], Any], received: dict[str, Tensor], sums: dict[str, int]):
        self._load, self._received, self._sums = load, received, sums

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        weights = list(weights)
        for name, tensor in weights:
            self._received[name] = torch.empty_like(tensor, device="meta")
            self._sums[name] = checksum(tensor)
        self._load(weights)


class Recording(WeightTransferEngine):
    """Put before a worker's side: records what goes into the model, and leaves the group when an update ends or fails.

    A group lives for one update, so that a server which was started again since the last one is in it.

    Attributes:
        received: each parameter of the last update without its memory, by Hugging Face name.
        checksums: of each, as it came.
    """

    model: Any
    received: dict[str, Tensor]
    checksums: dict[str, int]

    def start_weight_update(self) -> None:
        self.received, self.checksums = {}, {}
        super().start_weight_update()  # type: ignore[safe-super]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        model = self.model
        self.model = _Listening(model.load_weights, self.received, self.checksums)
        try:
            super().update_weights(update_info)
        except BaseException:
            self.model = model
            self.finish_weight_update()  # vLLM does not, and half-loaded layers would count as loaded in the next update
            raise
        self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[safe-super]
        repack_output_head(self.model)
        self.shutdown()


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's nccl backend with gloo in its place: it needs no CUDA, and the two ends may share a device."""

    init_info_cls = GlooInitInfo
    model: Any
    model_update_group: Any

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:  # type: ignore[override]
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.model_update_group = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.seconds
        )

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if self.model_update_group is None:
            raise RuntimeError("this worker is in no group: init_weight_transfer_engine comes first")
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(tensor)
            self.model.load_weights([(name, tensor.to(self.device))])


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """Rank 0's side of it."""

    init_info_cls = GlooTrainerInitInfo
    model_update_group: Any

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "there is always one here"
        engine = cls(client=client, source=source, packed=False)
        where = init_info.master_address, init_info.master_port
        theirs = GlooInitInfo(*where, rank_offset=1, world_size=init_info.world_size, seconds=init_info.seconds)
        with ThreadPoolExecutor(1) as pool:  # the workers answer when all are there, this process among them
            answer = pool.submit(client.init_weight_transfer_engine, asdict(theirs))
            engine.model_update_group = GlooGroup(*where, 0, init_info.world_size, init_info.seconds)
            answer.result()
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self.model_update_group.broadcast(tensor)


class RecordingGloo(Recording, GlooWeightTransferEngine): ...


class RecordingNCCL(Recording, NCCLWeightTransferEngine): ...


class RecordingIPC(Recording, IPCWeightTransferEngine): ...


for _name, _engine in (("gloo", RecordingGloo), ("nccl", RecordingNCCL), ("ipc", RecordingIPC)):
    WeightTransferEngineFactory.register_engine(f"cppo_{_name}", _engine)
WeightTransferTrainerFactory.register_engine(GlooTrainerInitInfo.backend, GlooTrainerWeightTransferEngine)
