"""SAPO: Soft Adaptive Policy Optimization (arXiv 2511.20347)."""

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
class SAPO(TrustRegion):
    """A soft clip: the objective is ``(4 / tau) sigmoid(tau (rho_t - 1)) A_t``, and no token is dropped.

    With ``s = sigmoid(tau (rho - 1))`` its gradient weight is ``4 s (1 - s) rho``: 1 at rho = 1, fading on both sides.

    Args:
        tau_pos: temperature of tokens with A > 0.
        tau_neg: temperature of the others; the larger, the faster their weight fades.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"SAPO.{name} must be above 0 (usual: 1.0 and 1.05), got {getattr(self, name)}")

    @property
    def recomputable(self) -> bool:
        return True

    def __call__(self, stats: TokenStats) -> Gate:
        ratio, advantages, mask = stats.ratio, stats.advantages, stats.mask
        tau = torch.full_like(advantages, self.tau_neg).masked_fill_(advantages > 0, self.tau_pos)
        odds = (-tau * (ratio - 1)).exp()  # (1 - s) / s; torch's sigmoid rounds by where a number lies in memory
        soft = 1 / (1 + odds)
        return Gate(
            weight=(4 * odds * soft.square() * ratio).masked_fill(~mask, 0.0),
            keep=mask,
            diagnostics={
                "toward": stats.toward,
                "surrogate": (4 / tau * soft * advantages).masked_fill(~mask, 0.0),
            },
        )
