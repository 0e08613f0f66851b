"""How much the trust region drops, why, and where in the responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cppo_lightning.callbacks.gate_metrics import GateMetrics
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import Totals, mask_names, mask_totals

if TYPE_CHECKING:
    from cppo_lightning.batch import Gate, TokenStats


class MaskRate(GateMetrics):
    """Shares of the trainable tokens, logged at each optimizer step.

    ``mask/rate`` was dropped; ``mask/by_position`` and ``mask/by_budget`` split it by cause where the trust region tells them
    apart; ``mask/toward`` pulls pi back to mu; ``mask/rate_at/00-10`` and so on is the rate by relative position.

    Args:
        bins: number of equal slices of a response's own length.

    Raises:
        ConfigError: ``bins`` below 1 or above 100.
    """

    def __init__(self, bins: int = 10) -> None:
        if not 1 <= bins <= 100:
            raise ConfigError(f"MaskRate.bins must be from 1 to 100 (usual: 10), got {bins}")
        super().__init__(mask_names(bins))
        self.bins = bins

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return mask_totals(stats, gate, self.bins)
