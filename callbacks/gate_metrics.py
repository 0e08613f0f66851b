"""What all callbacks that read gates share: sums per micro-batch, one reduction per optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.metrics import Maxima, Totals, WeightedMeans, drain, log_metrics

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats


class GateMetrics(Callback):
    """Sums quantities over a step's gates and logs them once, over all micro-batches and ranks, at every optimizer step.

    What it saw of a step that was not taken is not logged: that step has no number of its own.

    Args:
        means: names that ``totals`` may give.
        maxima: names that ``maxima`` may give.
    """

    def __init__(self, means: Sequence[str], maxima: Sequence[str] = ()) -> None:
        super().__init__()
        self._means = WeightedMeans(means)
        self._maxima = Maxima(maxima)
        self._before = 0  # optimizer steps taken before the one that the newest gate is of

    @abstractmethod
    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        """Sum and count of each quantity in this micro-batch, as scalars on its device."""

    def maxima(self, stats: TokenStats, gate: Gate) -> Mapping[str, Tensor]:
        """Largest value of each quantity in this micro-batch, as scalars on its device."""
        return {}

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums without waiting for the accelerator."""
        self._before = trainer.global_step
        self._means.update(self.totals(stats, gate))
        self._maxima.update(self.maxima(stats, gate))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each optimizer step, or after none was taken, on every rank: reduces, logs if one was, starts anew."""
        metrics = drain(self._means, pl_module.device)
        if self._maxima.names:  # decided by the constructor, so that every rank takes part or none does
            metrics |= drain(self._maxima, pl_module.device)
        if trainer.global_step > self._before:
            # by its own number, counted from 0, as Lightning counts what the module logs
            log_metrics(trainer, metrics, step=trainer.global_step - 1)
