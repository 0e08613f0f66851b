"""CPPO: Cumulative Prefix-divergence Policy Optimization (arXiv 2606.10968)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cppo_lightning.batch import Gate
from cppo_lightning.divergences import Divergence, TopKTV, captured_mass
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

    S and W run over every trainable token, kept or not.  ``CPPO(w_min=1)`` has no position weight, ``CPPO(delta_b=None)`` no
    prefix budget, and with neither it is DPPO.

    Args:
        divergence: D_t; the paper's main runs use the Top-K reduced TV with K = 20.
        delta: token threshold on w_t D_t.
        delta_b: prefix budget per unit of position weight; the lower end when ``adaptive``; None for no prefix budget: then
            c_t = delta, ``adaptive`` says nothing, and the gate has no ``delta_b``, ``budget_...`` and ``first_exhausted``.
        w_min: position weight of the last token, so that D_t may grow from delta to delta / w_min along the response.
        adaptive: one budget per response, clamp(quantile of D_1..D_T, delta_b, ceiling * delta_b) (Eq. 22, Base models);
            otherwise ``delta_b`` for all (post-trained models).
        quantile: which quantile, linearly interpolated; the paper's P90.
        ceiling: upper end of the adaptive budget as a multiple of ``delta_b``.
        max_ratio: cap on rho_t as a gradient weight; None for the paper's uncapped ratio.
        noise: what numerics alone make of D_t on average, which callback ``Mismatch`` reports as ``mismatch/divergence_mean``;
            0 is the paper's.  Prefix sums are of w_t (D_t - noise), adaptive budgets from the quantile of D_t - noise: in all,
            each response's budget is ``noise`` larger, and gates and metrics show it so.  Sums of max(D_t - noise, 0) would
            still charge a third of what numerics spend (benchmarks/mismatch.py).

    Raises:
        ConfigError: a value outside its range.
    """

    divergence: Divergence = TopKTV()
    delta: float = 0.15
    delta_b: float | None = 0.02
    w_min: float = 0.8
    adaptive: bool = True
    quantile: float = 0.9
    ceiling: float = 2.0
    max_ratio: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "delta": (self.delta > 0, "above 0 (the paper uses 0.15)"),
            "delta_b": (
                self.delta_b is None or 0 <= self.delta_b < math.inf,
                "at least 0 (the paper uses 0.015 to 0.03), or null for no prefix budget",
            ),
            "w_min": (0 < self.w_min <= 1, "in (0, 1] (the paper uses 0.8)"),
            "quantile": (0 <= self.quantile <= 1, "in [0, 1] (the paper uses 0.9)"),
            "ceiling": (self.ceiling >= 1, "at least 1 (the paper uses 2)"),
            "max_ratio": (self.max_ratio is None or self.max_ratio > 0, "above 0, or null for no cap"),
            "noise": (self.noise >= 0, "at least 0 (the paper has none)"),
        }
        for name, (good, right) in ranges.items():
            if not good:
                raise ConfigError(f"{type(self).__name__}.{name} must be {right}, got {getattr(self, name)}")

    @property
    def top_k(self) -> int:
        return self.divergence.top_k

    @property
    def token_threshold(self) -> float:
        return self.delta

    def __call__(self, stats: TokenStats) -> Gate:
        # in place where a tensor is this call's own: at a million tokens its allocation costs more than the arithmetic
        mask, padding = stats.mask, ~stats.mask
        divergence = self.divergence(stats)  # D, [B, T], 0 where masked
        weight = self.token_weight(stats)  # w, [B, T], 0 where masked
        weighted = weight * divergence  # Z
        spent, spent_before = _prefix_sums(weighted)  # S_t, S_{t-1}
        delta_b = self.budget(divergence, mask)  # [B], None for no prefix budget
        if delta_b is None:
            allowed = torch.full_like(weighted, math.inf)
        else:
            allowed = (delta_b[:, None] * _prefix_sums(weight)[1]).add_(self.delta)  # what S_t may be: delta + delta_b W_{t-1}
        threshold = (allowed - spent_before).clamp_(max=self.delta)  # c_t

        ratio, toward = stats.ratio, stats.toward
        dropped = (weighted > threshold).logical_and_(mask).logical_and_(~toward)
        by_position = (weighted > self.delta).logical_and_(dropped)
        diagnostics = {
            "divergence": divergence,
            "token_weight": weight,
            "weighted_divergence": weighted,
            "toward": toward,
            "masked_by_position": by_position,
            "masked_by_budget": dropped & ~by_position,
        }
        if delta_b is not None:
            diagnostics |= _budget_diagnostics(mask, threshold, spent[:, -1], allowed) | {"delta_b": delta_b}
        diagnostics["threshold"] = threshold.masked_fill_(padding, 0.0)
        if self.top_k:
            diagnostics["captured_mass"] = captured_mass(stats, self.top_k)
        capped = ratio if self.max_ratio is None else ratio.clamp(max=self.max_ratio)
        gated = self.gated(capped, dropped, weighted, spent, allowed).masked_fill_(padding, 0.0)
        if delta_b is not None:
            diagnostics["budget_allowed"] = allowed.masked_fill_(padding, 0.0)
        return Gate(weight=gated, keep=mask & ~dropped, diagnostics=diagnostics)

    def token_weight(self, stats: TokenStats) -> Tensor:
        """The w_t that each token gets ``[B, T]`` float32, 0 where masked; here those of its position."""
        return self.position_weight(stats.mask)

    def position_weight(self, mask: Tensor, position: Tensor | None = None) -> Tensor:
        """w_t (Eq. 9) ``[B, T]`` float32, 0 where masked: from 1 at the first trainable token to ``w_min`` at its last.

        ``position``: the 0-based position ``[B, T]``, integers, to take it at, None for a token's own.
        """
        position = positions(mask) if position is None else position
        last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
        return position.float().mul_(1 - self.w_min).div_(last).neg_().add_(1).masked_fill_(~mask, 0.0)

    def budget(self, divergence: Tensor, mask: Tensor) -> Tensor | None:
        """delta_b of each response (Eq. 22) and ``noise``, ``[B]`` float32; None for no prefix budget."""
        if self.delta_b is None:
            return None
        if not self.adaptive:
            return divergence.new_full(divergence.shape[:1], self.delta_b + self.noise)
        net = masked_quantile(divergence, mask, self.quantile) - self.noise
        return net.clamp(self.delta_b, self.ceiling * self.delta_b) + self.noise

    def gated(self, ratio: Tensor, dropped: Tensor, weighted: Tensor, spent: Tensor, allowed: Tensor) -> Tensor:
        """A new tensor with each token's weight (Eq. 10) ``[B, T]``: rho_t, and 0 where dropped.

        All are ``[B, T]``; ``weighted`` is Z_t, ``spent`` S_t, and ``allowed`` delta + delta_b W_{t-1}.
        """
        return ratio.masked_fill(dropped, 0.0)


def positions(mask: Tensor) -> Tensor:
    """0-based position among a response's trainable tokens, ``[B, T]`` int32; -1 before the first."""
    return mask.cumsum(-1, dtype=torch.int32).sub_(1)


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


def _budget_diagnostics(mask: Tensor, threshold: Tensor, spent: Tensor, allowed: Tensor) -> dict[str, Tensor]:
    """How much of the budget each response spent in all, and where it first ran out, ``[B]`` each."""
    position = positions(mask)
    last = torch.searchsorted(position, position[:, -1:].contiguous())  # the last trainable token's column
    exhausted = threshold.le(0).logical_and_(mask)
    first = exhausted.view(torch.uint8).argmax(-1, keepdim=True)
    ever = exhausted.gather(-1, first)
    return {
        "budget_spent": spent / allowed.gather(-1, last).squeeze(-1),
        "budget_exhausted": ever.squeeze(-1),
        # 0-based position among trainable tokens; -1 when the budget lasts
        "first_exhausted": position.gather(-1, first).masked_fill_(~ever, -1).long().squeeze(-1),
    }


def _prefix_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive and exclusive prefix sums ``[B, T]``: the same numbers, one column apart."""
    sums = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, -1, out=sums[:, 1:])
    return sums[:, 1:], sums[:, :-1]
