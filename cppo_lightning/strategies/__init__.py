"""Strategies of Lightning's Trainer that spread a policy over ranks."""

from cppo_lightning.strategies.fsdp2 import FSDP2
from cppo_lightning.strategies.sharded_checkpoint import ReadsShards
from cppo_lightning.strategies.supported import WeightsInBF16, check_strategy, gradients_kept_apart

__all__ = ["FSDP2", "ReadsShards", "WeightsInBF16", "check_strategy", "gradients_kept_apart"]
