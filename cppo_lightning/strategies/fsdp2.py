"""FSDP2 on Lightning: parameters, gradients and optimizer states in shards, each on one rank."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from cppo_lightning.errors import ConfigError
from cppo_lightning.strategies import sharded_checkpoint
from cppo_lightning.strategies.sharding import Sharding
from cppo_lightning.untrusted import META

if TYPE_CHECKING:
    from cppo_lightning.policy import Policy
    from cppo_lightning.policy_config import PolicyConfig


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism (``torch.distributed.fsdp.fully_shard``); every rank has prompts of its own.

    With ``trainer.precision: bf16-mixed`` shards and optimizer states are float32, and what is gathered and computed with is
    bf16; with ``bf16-true`` all of it is bf16.  Gradients are summed over ranks in float32 in any case.

    A checkpoint is a folder of safetensors, which any number of ranks can read.

    Args:
        replicas: copies of the weights.  1 shards over all ranks; ``nodes`` within a node, each of which has a copy (hybrid
            sharding, for networks that are slow between nodes).
        cpu_offload: shards, gradients and optimizer states stay in host memory, and the optimizer runs on the CPU.
        process_group_backend: for ``torch.distributed``; None for what the device wants.
        timeout: after which a rank that others wait for is given up.

    Raises:
        ConfigError: ranks cannot be divided into that many replicas.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if replicas != "nodes" and replicas < 1:
            raise ConfigError(f"trainer.strategy replicas must be at least 1, or nodes, got {replicas}")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.replicas: int | Literal["nodes"] = replicas
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        if ranks % replicas:
            raise ConfigError(f"trainer.strategy replicas = {replicas} does not divide {ranks} ranks; take a divisor of them")
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed in host memory
        self._data_parallel_size, self._tensor_parallel_size = ranks, 1
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if replicas > 1:
            shape, names = (replicas, ranks // replicas), ("replicas", "shards")
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        computed = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        self._sharding = Sharding(mesh, self.root_device, computed, self.cpu_offload)

    def load_policy(self, config: PolicyConfig) -> Policy:
        """The policy of ``config``, of which this rank has its shards alone.  Every rank must call this."""
        half = self.precision_plugin.precision == "bf16-true"
        return self._sharding.load(replace(config, dtype="bfloat16") if half else config)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder ``filepath``, which is there whole or not at all.  Every rank must call this."""
        sharded_checkpoint.save(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizer states into their shards; returns the rest.  Every rank must call this.

        Raises:
            ConfigError: no sharded checkpoint, or not one of this model.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            raise ConfigError(f"ckpt_path: {str(path)!r} is one file, of a run that was not sharded; resume it without FSDP2")
        rest = self.checkpoint_io.load_checkpoint(path / META)
        assert self.model is not None
        sharded_checkpoint.load(path, rest, self.model, self.optimizers)
        return rest
