"""How far engine and trainer disagree before anything was learned from a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cppo_lightning.callbacks.gate_metrics import GateMetrics
from cppo_lightning.metrics import Totals, masked_max, masked_total

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats

GAP_MEAN, GAP_MAX = "mismatch/logp_gap_mean", "mismatch/logp_gap_max"
PROB_MEAN, PROB_MAX = "mismatch/prob_gap_mean", "mismatch/prob_gap_max"


class FirstUpdateMetrics(GateMetrics):
    """Quantities of each rollout's first update, where pi and mu have the same weights and only numerics tell them apart.

    Of rollouts drawn ahead (``data.plan.max_staleness`` 1) that is a run's first alone.
    """

    _on_policy = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update: notes whether the rollout's weights are today's."""
        self._on_policy = bool((batch.policy_version == trainer.global_step).all())

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums at a rollout's first update, and nothing later."""
        if self._on_policy:
            super().on_gate(trainer, pl_module, stats, gate)


class LogProbGap(FirstUpdateMetrics):
    """Differences between engine and trainer at equal weights; :class:`Mismatch` has these and more.

    ``mismatch/logp_gap_*`` is |log pi - log mu| in nats, ``mismatch/prob_gap_*`` is |pi - mu|, the unit of the trust
    region's delta; means and maxima over sampled tokens.
    """

    def __init__(self) -> None:
        super().__init__([GAP_MEAN, PROB_MEAN], [GAP_MAX, PROB_MAX])

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return gap_totals(stats)

    def maxima(self, stats: TokenStats, gate: Gate) -> Mapping[str, Tensor]:
        return gap_maxima(stats)


def gap_totals(stats: TokenStats) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of |log pi - log mu| and |pi - mu| over trainable tokens."""
    logp_gap, prob_gap = _gaps(stats)
    return {GAP_MEAN: masked_total(logp_gap, stats.mask), PROB_MEAN: masked_total(prob_gap, stats.mask)}


def gap_maxima(stats: TokenStats) -> dict[str, Tensor]:
    """Largest |log pi - log mu| and |pi - mu| over trainable tokens."""
    logp_gap, prob_gap = _gaps(stats)
    return {GAP_MAX: masked_max(logp_gap, stats.mask), PROB_MAX: masked_max(prob_gap, stats.mask)}


def _gaps(stats: TokenStats) -> tuple[Tensor, Tensor]:
    logp, rollout_logp = (x.masked_fill(~stats.mask, 0.0) for x in (stats.logp, stats.rollout_logp))
    return (logp - rollout_logp).abs(), (logp.exp() - rollout_logp.exp()).abs()
