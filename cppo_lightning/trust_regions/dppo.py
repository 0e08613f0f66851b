"""DPPO: Divergence Proximal Policy Optimization (arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.batch import Gate
from cppo_lightning.divergences import Divergence, TopKTV, captured_mass
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class DPPO(TrustRegion):
    """One threshold on the divergence of every token (Eq. 12): dropped are tokens that move away from mu with D_t > delta.

    Tokens with ``A_t (rho_t - 1) <= 0`` move back to mu and are kept whatever their divergence.

    Args:
        divergence: D_t.
        delta: threshold; the paper uses 0.15 (mixture-of-experts models: 0.2) for TV and 0.05 for KL.
        max_ratio: cap on rho_t as a gradient weight (Eq. 23; public code: 5 to 20); None for the uncapped ratio.

    Raises:
        ConfigError: a value outside its range.
    """

    divergence: Divergence = TopKTV()
    delta: float = 0.15
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ConfigError(f"DPPO.delta must be above 0 (usual: 0.15 for TV, 0.05 for KL), got {self.delta}")
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise ConfigError(f"DPPO.max_ratio must be above 0, or null for no cap, got {self.max_ratio}")

    @property
    def top_k(self) -> int:
        return self.divergence.top_k

    @property
    def token_threshold(self) -> float:
        return self.delta

    def __call__(self, stats: TokenStats) -> Gate:
        ratio, mask = stats.ratio, stats.mask
        divergence = self.divergence(stats)
        toward = stats.toward
        keep = mask & (toward | (divergence <= self.delta))
        diagnostics = {"divergence": divergence, "toward": toward}
        if self.top_k:
            diagnostics["captured_mass"] = captured_mass(stats, self.top_k)
        return Gate(
            weight=(ratio if self.max_ratio is None else ratio.clamp(max=self.max_ratio)).masked_fill(~keep, 0.0),
            keep=keep,
            diagnostics=diagnostics,
        )
