"""How far the policy has moved from the one that sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cppo_lightning.callbacks.gate_metrics import GateMetrics
from cppo_lightning.metrics import Totals, masked_max, masked_total

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats

DIAGNOSTICS = ("divergence", "weighted_divergence")


class Divergence(GateMetrics):
    """``trust_region/divergence_mean`` and ``_max`` over trainable tokens, and the same of ``weighted_divergence`` (w_t D_t).

    Logged at each optimizer step, in the units of the trust region's own divergence; a trust region without one logs nothing.
    """

    def __init__(self) -> None:
        super().__init__(
            means=[f"trust_region/{name}_mean" for name in DIAGNOSTICS],
            maxima=[f"trust_region/{name}_max" for name in DIAGNOSTICS],
        )

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        found = gate.diagnostics
        return {f"trust_region/{name}_mean": masked_total(found[name], stats.mask) for name in DIAGNOSTICS if name in found}

    def maxima(self, stats: TokenStats, gate: Gate) -> Mapping[str, Tensor]:
        found = gate.diagnostics
        return {f"trust_region/{name}_max": masked_max(found[name], stats.mask) for name in DIAGNOSTICS if name in found}
