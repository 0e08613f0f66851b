"""CPPO: Cumulative Prefix-divergence Policy Optimization (arXiv 2606.10968)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from cppo_lightning.batch import Gate
from cppo_lightning.divergences import Divergence, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class CPPO(TrustRegion):
    """Position-weighted threshold and cumulative prefix budget (Eq. 8-11, Algorithm 1).

    With D_t the divergence, T the response's own number of trainable tokens and S_0 = W_0 = 0::

        w_t = 1 - (1 - w_min) (t - 1) / (T - 1)         position weight, w_1 = 1 when T = 1
        Z_t = w_t D_t,  S_t = Z_1 + .. + Z_t,  W_t = w_1 + .. + w_t
        c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1})
        keep_t = A_t (rho_t - 1) <= 0  or  Z_t <= c_t

    S and W run over every trainable token, kept or not.

    Args:
        divergence: D_t; the paper's main runs use the Top-K reduced TV with K = 20.
        delta: token threshold on w_t D_t.
        delta_b: prefix budget per unit of position weight; the lower end when ``adaptive``.
        w_min: position weight of the last token, so that D_t may grow from delta to delta / w_min along the response.
        adaptive: one budget per response, clamp(quantile of D_1..D_T, delta_b, ceiling * delta_b) (Eq. 22, Base models);
            otherwise ``delta_b`` for all (post-trained models).
        quantile: which quantile, linearly interpolated; the paper's P90.
        ceiling: upper end of the adaptive budget as a multiple of ``delta_b``.
        max_ratio: cap on rho_t as a gradient weight; None for the paper's uncapped ratio.

    Raises:
        ConfigError: a value outside its range.
    """

    divergence: Divergence = TopKTV()
    delta: float = 0.15
    delta_b: float = 0.02
    w_min: float = 0.8
    adaptive: bool = True
    quantile: float = 0.9
    ceiling: float = 2.0
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "delta": (self.delta > 0, "above 0 (the paper uses 0.15)"),
            "delta_b": (self.delta_b >= 0, "at least 0 (the paper uses 0.015 to 0.03)"),
            "w_min": (0 < self.w_min <= 1, "in (0, 1] (the paper uses 0.8)"),
            "quantile": (0 <= self.quantile <= 1, "in [0, 1] (the paper uses 0.9)"),
            "ceiling": (self.ceiling >= 1, "at least 1 (the paper uses 2)"),
            "max_ratio": (self.max_ratio is None or self.max_ratio > 0, "above 0, or null for no cap"),
        }
        for name, (good, right) in ranges.items():
            if not good:
                raise ConfigError(f"CPPO.{name} must be {right}, got {getattr(self, name)}")

    @property
    def top_k(self) -> int:
        return self.divergence.top_k

    def __call__(self, stats: TokenStats) -> Gate:
        mask = stats.mask
        divergence = self.divergence(stats)  # D, [B, T], 0 where masked
        weight = self.position_weight(mask)  # w, [B, T], 0 where masked
        weighted = weight * divergence  # Z
        spent = weighted.cumsum(-1)  # S_t
        allowance = weight.cumsum(-1)  # W_t
        spent_before, allowance_before = _shift(spent), _shift(allowance)
        delta_b = self.budget(divergence, mask)  # [B]
        slack = self.delta + delta_b[:, None] * allowance_before - spent_before
        threshold = slack.clamp(max=self.delta)  # c_t

        ratio = stats.ratio
        toward = (stats.advantages * (ratio - 1) <= 0) & mask  # the update pulls pi back to mu
        dropped = mask & ~toward & (weighted > threshold)
        keep = mask & ~dropped
        exhausted = mask & (threshold <= 0)
        position = mask.cumsum(-1) - 1
        ever = exhausted.any(-1)
        return Gate(
            weight=(ratio if self.max_ratio is None else ratio.clamp(max=self.max_ratio)) * keep,
            keep=keep,
            diagnostics={
                "divergence": divergence,
                "weighted_divergence": weighted,
                "threshold": threshold.masked_fill(~mask, 0.0),
                "toward": toward,
                "masked_by_position": dropped & (weighted > self.delta),
                "masked_by_budget": dropped & (weighted <= self.delta),
                "delta_b": delta_b,
                "budget_spent": spent[:, -1] / (self.delta + delta_b * (allowance_before * mask).amax(-1)),
                "budget_exhausted": ever,
                # 0-based position among trainable tokens; -1 when the budget lasts
                "first_exhausted": torch.where(ever, position.masked_fill(~exhausted, position.shape[-1]).amin(-1), -1),
            },
        )

    def position_weight(self, mask: Tensor) -> Tensor:
        """w_t (Eq. 9) ``[B, T]`` float32: from 1 at a response's first trainable token to ``w_min`` at its last."""
        position = mask.cumsum(-1) - 1
        last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
        return (1 - (1 - self.w_min) * position / last) * mask

    def budget(self, divergence: Tensor, mask: Tensor) -> Tensor:
        """delta_b of each response ``[B]`` float32 (Eq. 22)."""
        if not self.adaptive:
            return divergence.new_full(divergence.shape[:1], self.delta_b)
        return masked_quantile(divergence, mask, self.quantile).clamp(self.delta_b, self.ceiling * self.delta_b)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile of each row's unmasked entries, ``[B]``; 0 for a row without any.

    Reads only the upper ``1 - q`` of each row, a tenth for the paper's P90, and never waits for the device.
    """
    width = values.shape[-1]
    top = values.masked_fill(~mask, -math.inf).topk(min(width, math.ceil((1 - q) * (width - 1)) + 2), dim=-1).values
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    # float64: at 16k tokens a float32 rank is off by a thousandth
    rank = q * last.double()
    below = rank.floor().long()
    above = (below + 1).minimum(last)
    low, high = top.gather(-1, last - below), top.gather(-1, last - above)
    quantile = torch.lerp(low, high, (rank - below).to(low.dtype))
    return quantile.squeeze(-1).masked_fill(~mask.any(-1), 0.0)


def _shift(sums: Tensor) -> Tensor:
    """Inclusive prefix sums to exclusive ones, without the rounding of a subtraction."""
    return pad(sums[:, :-1], (1, 0))
