"""Which strategies a policy can be trained under, and what Lightning's own ones and its precisions need for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy

from cppo_lightning.errors import ConfigError
from cppo_lightning.strategies.fsdp2 import FSDP2


class WeightsInBF16(Precision):
    """``trainer.precision: bf16-true``: the policy is loaded in bfloat16 (:meth:`PolicyConfig.under`), and nothing is rounded.

    Lightning's own would round the model's buffers too, so that rotary positions are others than the engine's; batches, and
    with log mu every ratio; and, by torch's default dtype, what a trust region computes from positions.
    """

    precision = "bf16-true"


def check_strategy(strategy: Strategy) -> None:
    """Raise :class:`ConfigError` for one whose weights an engine could not be given by their names."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2):
        raise ConfigError(
            f"trainer.strategy is Lightning's {type(strategy).__name__}, which this trainer cannot sample from; take ddp, or "
            "shard with cppo_lightning.strategies.FSDP2 (a --config of configs/strategy/)"
        )


def gradients_kept_apart(strategy: Strategy) -> AbstractContextManager[None]:
    """Backward passes meanwhile add to each rank's own gradients; the next one after it averages them over ranks.

    DDP alone needs it: it would average the whole gradient at each pass.  FSDP2 leaves each rank its shard of the sum, and
    could not keep more.
    """
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
