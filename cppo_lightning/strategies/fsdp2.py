"""FSDP2 on Lightning: parameters, gradients and optimizer states in shards, each on one rank."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from cppo_lightning.errors import ConfigError
from cppo_lightning.replacing import standing
from cppo_lightning.strategies import sharded_checkpoint
from cppo_lightning.strategies.sharding import Sharding
from cppo_lightning.untrusted import META

if TYPE_CHECKING:
    from cppo_lightning.policy import Policy
    from cppo_lightning.policy_config import PolicyConfig


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism (``torch.distributed.fsdp.fully_shard``), with tensor parallelism if wanted.

    Every rank samples prompts of its own.  With ``tensor_parallel_size`` above 1 as many neighbouring ranks hold parts of each
    layer, and all of them train on what any of them sampled.

    With ``trainer.precision: bf16-mixed`` shards and optimizer states are float32, and what is gathered and computed with is
    bf16; with ``bf16-true`` all of it is bf16.  Gradients are summed over ranks in float32 in any case.

    A checkpoint is a folder of safetensors, which any number of ranks can read.

    Args:
        replicas: copies of the weights.  1 shards over all ranks; ``nodes`` within a node, each of which has a copy (hybrid
            sharding, for networks that are slow between nodes).
        tensor_parallel_size: ranks that compute each layer together, for models that transformers has a plan for (Llama, Qwen2,
            Qwen3); it has to divide heads, key-value heads and the sizes of layers and vocabulary.
        cpu_offload: shards, gradients and optimizer states stay in host memory, and the optimizer runs on the CPU.
        process_group_backend: for ``torch.distributed``; None for what the device wants.
        timeout: after which a rank that others wait for is given up.

    Raises:
        ConfigError: ranks cannot be divided in that way.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        tensor_parallel_size: int = 1,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if replicas != "nodes" and replicas < 1:
            raise ConfigError(f"trainer.strategy replicas must be at least 1, or nodes, got {replicas}")
        if tensor_parallel_size < 1:
            raise ConfigError(f"trainer.strategy tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.replicas: int | Literal["nodes"] = replicas
        self.tensor_parallel_size = tensor_parallel_size
        self.cpu_offload = cpu_offload

    @property
    def ranks(self) -> int:
        """How many there are, before they run too."""
        return self.num_nodes * self.num_processes

    @property
    def shards(self) -> int:
        """Ranks that one copy of the weights is spread over.

        Raises:
            ConfigError: ranks cannot be divided in that way.
        """
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        for key, size in (("replicas", replicas), ("tensor_parallel_size", self.tensor_parallel_size)):
            if self.ranks % size:
                raise ConfigError(f"trainer.strategy {key} = {size} does not divide {self.ranks} ranks; take a divisor of them")
        shards = self.ranks // replicas
        if shards % self.tensor_parallel_size:
            raise ConfigError(
                f"trainer.strategy tensor_parallel_size = {self.tensor_parallel_size} does not divide the {shards} ranks of a "
                f"replica; take a divisor of them"
            )
        return shards

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        together = self.tensor_parallel_size
        return {"num_replicas": self.ranks // together, "rank": self.global_rank // together}

    def setup_environment(self) -> None:
        ranks, shards, together = self.ranks, self.shards, self.tensor_parallel_size
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed in host memory
        self._data_parallel_size, self._tensor_parallel_size = ranks // together, together
        super().setup_environment()
        mesh, data = self.device_mesh, "data_parallel"
        if shards < ranks:
            shape, names = (ranks // shards, shards // together, together), ("replicas", "shards", "tensor_parallel")
            mesh, data = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names), names[:2]
        layers = mesh["tensor_parallel"] if together > 1 else None
        computed = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        self._sharding = Sharding(mesh[data], self.root_device, layers, computed, self.cpu_offload)

    def load_policy(self, config: PolicyConfig) -> Policy:
        """The policy of ``config``, of which this rank has its shards alone.  Every rank must call this."""
        return self._sharding.load(config)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder ``filepath``, which is there whole or not at all.  Every rank must call this."""
        assert self.model is not None
        sharded_checkpoint.save(checkpoint, Path(self.broadcast(filepath)), self.model)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizer states, of a run that was sharded or not, into their shards; returns the rest.

        Every rank must call this.

        Raises:
            ConfigError: no checkpoint, or not one of this model.
        """
        path = Path(self.broadcast(standing(checkpoint_path)))
        rest = self.checkpoint_io.load_checkpoint(path / META if path.is_dir() else path)
        assert self.model is not None
        sharded_checkpoint.load(path, rest, self.model, self.optimizers)
        return rest
