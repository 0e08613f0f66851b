"""PPO's clipped surrogate (arXiv 1707.06347), as GRPO and DAPO use it."""

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
class PPOClip(TrustRegion):
    """The gradient of ``min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)``, which is a mask on ``rho A grad log pi``.

    ``PPOClip(0.2, 0.2)`` is PPO and GRPO; the defaults are DAPO's Clip-Higher (arXiv 2503.14476), the CPPO paper's GRPO.

    Args:
        eps_low: how far rho may fall below 1 when A < 0.
        eps_high: how far rho may rise above 1 when A > 0.
        dual_clip: c > 1; where A < 0 the objective is at least c A, so tokens with rho > c have no gradient
            (arXiv 1912.09729); None for no dual clip.

    Raises:
        ConfigError: a value outside its range.
    """

    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.eps_low <= 1:
            raise ConfigError(f"PPOClip.eps_low must be in (0, 1] (usual: 0.2), got {self.eps_low}")
        if not self.eps_high > 0:
            raise ConfigError(f"PPOClip.eps_high must be above 0 (usual: 0.2 to 0.28), got {self.eps_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"PPOClip.dual_clip must be above 1 (usual: 3) or null, got {self.dual_clip}")

    @property
    def recomputable(self) -> bool:
        return True

    def __call__(self, stats: TokenStats) -> Gate:
        ratio, advantages, mask = stats.ratio, stats.advantages, stats.mask
        clipped_high = mask & (advantages > 0) & (ratio > 1 + self.eps_high)
        clipped_low = mask & (advantages < 0) & (ratio < 1 - self.eps_low)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - self.eps_low, 1 + self.eps_high) * advantages)
        dual_clipped = torch.zeros_like(mask)
        if self.dual_clip is not None:
            dual_clipped = mask & (advantages < 0) & (ratio > self.dual_clip)
            surrogate = torch.where(dual_clipped, self.dual_clip * advantages, surrogate)
        keep = mask & ~(clipped_high | clipped_low | dual_clipped)
        return Gate(
            # filled, not multiplied: an overflowed ratio times 0 would be NaN
            weight=ratio.masked_fill(~keep, 0.0),
            keep=keep,
            diagnostics={
                "toward": stats.toward,
                "clipped_high": clipped_high,
                "clipped_low": clipped_low,
                "dual_clipped": dual_clipped,
                "surrogate": surrogate.masked_fill(~mask, 0.0),
            },
        )
