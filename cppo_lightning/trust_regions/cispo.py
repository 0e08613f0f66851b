"""CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.batch import Gate
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class CISPO(TrustRegion):
    """``clip(rho_t, min_weight, max_weight) A_t log pi(y_t)`` with a constant weight (Eq. 4-5): no token is dropped.

    Without limits, ``CISPO(0, inf)``, it is the plain importance-weighted policy gradient: no trust region at all.

    Args:
        min_weight: least weight; 0 for none, as the paper has it.
        max_weight: largest weight, the cap itself and not its distance from 1.  The paper does not print it; 4 to 8 were found
            equal (ScaleRL, arXiv 2510.13786).

    Raises:
        ConfigError: not ``0 <= min_weight <= 1 <= max_weight``.
    """

    min_weight: float = 0.0
    max_weight: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_weight <= 1:
            raise ConfigError(f"{type(self).__name__}.min_weight must be in [0, 1] (usual: 0), got {self.min_weight}")
        if not self.max_weight >= 1:
            raise ConfigError(
                f"{type(self).__name__}.max_weight must be at least 1 (usual: 5; it is the cap, not its distance from 1), "
                f"got {self.max_weight}"
            )

    @property
    def recomputable(self) -> bool:
        return True

    def importance(self, stats: TokenStats) -> Tensor:
        """The weight before it is clipped, ``[B, T]``."""
        return stats.ratio

    def __call__(self, stats: TokenStats) -> Gate:
        mask = stats.mask
        weight = self.importance(stats).clamp(self.min_weight, self.max_weight).masked_fill(~mask, 0.0)
        return Gate(
            weight=weight,
            keep=mask,
            diagnostics={
                "toward": stats.toward,
                "surrogate": (weight * stats.advantages * stats.logp).masked_fill(~mask, 0.0),
            },
        )
