"""A policy whose parameters lie in shards on several ranks, loaded without a whole copy on any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from cppo_lightning.errors import ConfigError
from cppo_lightning.lora import IS_ADAPTER
from cppo_lightning.policy import Policy, file_name
from cppo_lightning.ranks import is_rank_zero, on_all_ranks
from cppo_lightning.strategies.tensor_parallel import parallelize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cppo_lightning.policy_config import PolicyConfig


@dataclass(frozen=True)
class Sharding:
    """How parameters lie on ranks, by ``torch.distributed.fsdp.fully_shard``.

    Args:
        mesh: the ranks that hold one shard each, ``[ranks]``, or ``[replicas, ranks]`` with the shards of a replica in a row.
        device: of this rank.
        layers: the ranks that hold parts of the same layers and compute on the same batch; None for none.
        compute_dtype: of gathered weights and of activations; None for that of the weights.  Gradients are summed in float32.
        cpu_offload: shards, gradients and optimizer states stay in host memory.
    """

    mesh: DeviceMesh
    device: torch.device
    layers: DeviceMesh | None = None
    compute_dtype: torch.dtype | None = None
    cpu_offload: bool = False

    def load(self, config: PolicyConfig) -> Policy:
        """The policy of ``config``, of which this rank has its shards alone.  Every rank must call this.

        Each rank reads its part of the safetensors files.  Where a model's files are not laid out like the model, rank 0 loads
        it whole, in host memory, and hands the parts out.

        Raises:
            ConfigError: a model, or adapters, that ``layers`` cannot compute together; no weights have been loaded then.
        """
        if self.layers is not None and config.lora is not None:
            raise ConfigError(
                f"model.policy.lora does not go with trainer.strategy.tensor_parallel_size = {self.layers.size()}; take 1"
            )
        policy = Policy.without_weights(config)
        if self.layers is not None:
            parallelize(policy.model, self.layers)
        self._shard(policy)
        self._allocate(policy)
        _fill(policy, config)
        policy.check_head()
        cast("FSDPModule", policy).reshard()  # the root keeps what it gathered otherwise
        return policy

    def _shard(self, policy: Policy) -> None:
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.cpu_offload else OffloadPolicy(),
        }
        layers = set(policy.model._no_split_modules or ())
        for module in policy.modules():
            if type(module).__name__ in layers:
                fully_shard(module, **settings)
        # with the root go embedding, last norm and head: the two ends of tied embeddings must be in one group
        fully_shard(policy, **settings)
        register_fsdp_forward_method(policy, "check_head")

    def _allocate(self, policy: Policy) -> None:
        """Memory for this rank's shards; only the parameters are on the meta device."""
        buffers = {name: buffer.to(self.device) for name, buffer in policy.named_buffers()}
        policy.to_empty(device=torch.device("cpu") if self.cpu_offload else self.device)
        policy.model.tie_weights()  # each end of tied embeddings was given memory of its own
        for name, buffer in buffers.items():
            module, _, last = name.rpartition(".")
            policy.get_submodule(module)._buffers[last] = buffer


@torch.no_grad()
def _fill(policy: Policy, config: PolicyConfig) -> None:
    """Give all parameters the values that ``config`` says."""
    model, values = policy.model, dict[str, Tensor]()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, last = name.rpartition(".")
        if config.lora is not None and IS_ADAPTER.search(name):
            _assign(tensor, config.lora.initial(name, tensor.shape))
        elif last not in model.get_submodule(owner)._non_persistent_buffers_set:
            values[file_name(name)] = tensor.detach()
    folder = on_all_ranks(lambda: _folder_with(config.path, values.keys()))
    if folder is not None:
        load_tensors(values, storage_reader=HuggingFaceStorageReader(folder))
        return
    plain = replace(config, lora=None, attn_implementation="eager")  # the run's may need its GPU
    whole = on_all_ranks(lambda: Policy.load(plain).model if is_rank_zero() else None)
    weights = None if whole is None else {**dict(whole.named_buffers()), **dict(whole.named_parameters())}
    for name, tensor in values.items():
        _assign(tensor, torch.empty(tensor.shape) if weights is None else weights[name])


def _assign(tensor: Tensor, value: Tensor) -> None:
    """Give ``tensor`` the ``value`` that rank 0 has; what other ranks bring only has its shape."""
    # shards may be in host memory where the process group is not
    device = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device
    whole = value.to(device, tensor.dtype)
    torch.distributed.broadcast(whole, 0)
    copy_part(tensor, whole)


def copy_part(tensor: Tensor, whole: Tensor) -> None:
    """Give ``tensor`` its values in ``whole``, which every rank has; of a DTensor the part that this rank holds."""
    if isinstance(tensor, DTensor):
        # a DTensor's own distribute_tensor cannot cut one dimension by two meshes
        (part,) = tensor.__create_chunk_list__()
        whole = whole[tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))]
        tensor = tensor.to_local()
    tensor.copy_(whole)


def _folder_with(path: str, names: Any) -> str | None:
    """The folder of ``path`` if its safetensors files hold tensors of these ``names``, else None."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    held = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return str(folder) if held.keys() >= set(names) else None
