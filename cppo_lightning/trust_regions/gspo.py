"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cppo_lightning.batch import Gate
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class GSPO(TrustRegion):
    """PPO's clip on one ratio per response, the geometric mean ``s = exp(mean_t log rho_t)`` of its tokens' ratios.

    The objective is ``min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)`` per response, and grad s is
    ``s mean_t grad log pi(y_t)``.  Every token gets the weight s, and the mean over tokens is the aggregation's: with
    ``seq-mean-token-mean`` the objective and its gradient are GSPO's exactly, with ``token-mean`` a response counts by its
    length.  A clipped response is dropped whole.

    Args:
        eps_low: how far s may fall below 1 when A < 0.
        eps_high: how far s may rise above 1 when A > 0.

    Raises:
        ConfigError: a value outside its range.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    def __post_init__(self) -> None:
        if not 0 < self.eps_low <= 1:
            raise ConfigError(f"GSPO.eps_low must be in (0, 1] (usual: 3e-4), got {self.eps_low}")
        if not self.eps_high > 0:
            raise ConfigError(f"GSPO.eps_high must be above 0 (usual: 4e-4), got {self.eps_high}")

    @property
    def recomputable(self) -> bool:
        return True

    def __call__(self, stats: TokenStats) -> Gate:
        ratio, advantages, mask = stats.ratio, stats.advantages, stats.mask
        # cumsum, since how sum(-1) rounds depends on the padded width
        mean = ratio.log().cumsum(-1)[:, -1:] / mask.sum(-1, keepdim=True).clamp(min=1)
        whole = mean.exp()  # s, [B, 1]
        clipped_high = mask & (advantages > 0) & (whole > 1 + self.eps_high)
        clipped_low = mask & (advantages < 0) & (whole < 1 - self.eps_low)
        clipped = clipped_high | clipped_low
        surrogate = torch.minimum(whole * advantages, whole.clamp(1 - self.eps_low, 1 + self.eps_high) * advantages)
        keep = mask & ~clipped
        return Gate(
            weight=whole.expand_as(ratio).masked_fill(~keep, 0.0),
            keep=keep,
            diagnostics={
                "toward": stats.toward,
                "clipped_high": clipped_high,
                "clipped_low": clipped_low,
                "rejected": clipped.any(-1),
                "surrogate": surrogate.masked_fill(~mask, 0.0),
            },
        )
