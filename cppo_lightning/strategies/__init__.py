"""Strategies of Lightning's Trainer that spread a policy over ranks."""

from cppo_lightning.strategies.fsdp2 import FSDP2

__all__ = ["FSDP2"]
