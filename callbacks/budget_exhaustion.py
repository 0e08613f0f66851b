"""Where the cumulative prefix budget of a response runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from cppo_lightning.callbacks.gate_metrics import GateMetrics
from cppo_lightning.metrics import BUDGET_MEANS, Totals, budget_totals, masked_max

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats


class BudgetExhaustion(GateMetrics):
    """The prefix budget, logged at each optimizer step over responses with at least one trainable token.

    ``budget/exhausted_share``: responses in which some threshold c_t fell to 0.  ``budget/spent_mean`` and ``_max``: S_T as a
    share of what the response was allowed.  ``budget/delta_b``: mean budget per unit of position weight.
    ``budget/first_exhausted``: where it ran out, 0 to 1 of the response's own length, over the exhausted ones only.
    ``budget/threshold``: mean c_t over trainable tokens.

    With a trust region that has no budget it says so once and logs nothing, so that changing the trust region is one line.
    """

    def __init__(self) -> None:
        super().__init__(means=BUDGET_MEANS, maxima=["budget/spent_max"])
        self._told = False

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums, or tells once that there is no budget."""
        if "budget_exhausted" not in gate.diagnostics and not self._told:
            rank_zero_info("BudgetExhaustion: this trust region has no prefix budget; budget/* will not be logged.")
            self._told = True
        super().on_gate(trainer, pl_module, stats, gate)

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return budget_totals(stats, gate)

    def maxima(self, stats: TokenStats, gate: Gate) -> Mapping[str, Tensor]:
        spent = gate.diagnostics.get("budget_spent")
        return {} if spent is None else {"budget/spent_max": masked_max(spent, stats.mask.any(-1))}
