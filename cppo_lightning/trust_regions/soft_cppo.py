"""CPPO's soft variant: what the mask would drop is turned down instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cppo_lightning.trust_regions.cppo import CPPO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SoftCPPO(CPPO):
    """The soft gate of arXiv 2606.10968, App. C; the settings are :class:`CPPO`'s.

    ::

        x_t = max(Z_t / delta, S_t / (delta + delta_b W_{t-1}))
        weight_t = rho_t                    where A_t (rho_t - 1) <= 0, toward mu
                   rho_t min(1, 1 / x_t)    elsewhere

    x_t <= 1 just where :class:`CPPO` keeps a token that moves away, so ``Gate.keep`` is CPPO's: False where the weight was
    turned down, though it is never 0.  Metrics of dropped tokens thus count the tokens that the hard mask would drop.
    Without a prefix budget x_t = Z_t / delta.
    """

    def gated(self, ratio: Tensor, dropped: Tensor, weighted: Tensor, spent: Tensor, allowed: Tensor) -> Tensor:
        """A new tensor with each token's weight ``[B, T]``: rho_t, and rho_t / x_t where CPPO would drop it."""
        excess = torch.maximum(weighted / self.delta, spent / allowed).clamp_(min=1)  # below 1 by rounding alone where dropped
        return torch.where(dropped, ratio / excess, ratio)
