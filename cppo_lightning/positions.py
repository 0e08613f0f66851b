"""Where in the responses a trust region acts: sums by response position, and the stretch of tokens it dropped most of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cppo_lightning.divergences import BinaryTV
from cppo_lightning.figures.numbers import Cause
from cppo_lightning.metrics import sum_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats

_LOWEST, _HIGHEST, _PER_OCTAVE = -20, 5, 8  # exponents of 2 between which D_t is told apart, in steps of 2^(1/8)
LEVELS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2  # one more for what is below, one for what is above
RESOLUTION = 2 ** (1 / _PER_OCTAVE) - 1  # largest relative error that levels make in :func:`largest_tenth`
SLICES = 20  # of a response's own length, for where its budget first ran out


@dataclass(frozen=True)
class PositionBins:
    """Response positions in ``count`` bins of ``width``; the last one takes what lies beyond."""

    width: int
    count: int

    @classmethod
    def up_to(cls, longest: int, at_most: int) -> PositionBins:
        """Bins for responses of up to ``longest`` tokens: one for each position if these are ``at_most`` so many."""
        width = -(-longest // at_most)
        return cls(width, -(-longest // width))

    def index(self, mask: Tensor) -> Tensor:
        """Each token's bin ``[B, T]`` int64, by its position among its response's trainable tokens."""
        return ((mask.cumsum(-1) - 1).clamp(min=0) // self.width).clamp(max=self.count - 1)


def token_divergence(stats: TokenStats, gate: Gate) -> Tensor:
    """The trust region's D_t, or |pi - mu| of the sampled token where it has none: ``[B, T]``, 0 where masked or not finite.

    A forward pass may give NaN.  No step is taken on it, but its gates are seen before that is known.
    """
    own = gate.diagnostics.get("divergence")
    found = BinaryTV()(stats) if own is None else own
    return found.where(stats.mask & found.isfinite(), 0.0)


def token_limit(stats: TokenStats, gate: Gate, threshold: float) -> Tensor:
    """delta / w_t, the D_t that ``TrustRegion.token_threshold`` allows: ``[B, T]``, 0 where masked."""
    weight = gate.diagnostics.get("token_weight", torch.ones_like(stats.logp))
    return (threshold / weight).masked_fill(~stats.mask, 0.0)


class PositionSums:
    """Sums over tokens and responses, all in one tensor, so that ranks add them up in one reduction.

    Tokens are counted by position and by level of D_t, since no sum gives the largest tenth.

    Args:
        bins: of positions.
        flat: the sums, for instance of a checkpoint; None for zeros.

    Raises:
        ValueError: ``flat`` has another size than these bins need.
    """

    def __init__(self, bins: PositionBins, flat: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        shapes = [(bins.count, LEVELS), (bins.count, LEVELS), (bins.count,), (bins.count,), (SLICES,), (1,), (1,), (1,), (1,)]
        sizes = [math.prod(shape) for shape in shapes]
        if flat is None:
            flat = torch.zeros(sum(sizes), dtype=sum_dtype(torch.device(device)), device=device)
        if flat.shape != (sum(sizes),):
            raise ValueError(f"sums of shape {tuple(flat.shape)}, but {bins} need {sum(sizes)}")
        self.bins, self.flat = bins, flat
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        self.tokens: Tensor = parts[0]  # [N, L] trainable tokens
        self.divergence: Tensor = parts[1]  # [N, L] of D_t
        self.limit: Tensor = parts[2]  # [N] of delta / w_t
        self.dropped: Tensor = parts[3]  # [N] tokens
        self.exhausted: Tensor = parts[4]  # [E] responses whose budget first ran out there
        self.responses: Tensor = parts[5]  # [1] with a trainable token
        self.budgets: Tensor = parts[6]  # [1] of these, how many had a prefix budget that is finite
        self.delta_b: Tensor = parts[7]  # [1] of their delta_b
        self.by_budget: Tensor = parts[8]  # [1] tokens that the budget dropped

    def add(self, stats: TokenStats, gate: Gate, threshold: float | None) -> None:
        """Take one micro-batch in, without waiting for the device; ``threshold`` is ``TrustRegion.token_threshold``."""
        mask, found = stats.mask, gate.diagnostics
        real = mask.any(-1)  # ranks with less work get rows without tokens
        divergence = token_divergence(stats, gate)
        place = self.bins.index(mask)
        level = (divergence.clamp(min=2.0 ** (_LOWEST - 1)).log2() - _LOWEST).mul(_PER_OCTAVE).floor() + 1
        cell = place * LEVELS + level.clamp(0, LEVELS - 1).long()
        _scatter(self.tokens, cell, mask)
        _scatter(self.divergence, cell, divergence)
        _scatter(self.dropped, place, mask & ~gate.keep)
        if threshold is not None:
            _scatter(self.limit, place, token_limit(stats, gate, threshold))
        self.responses += real.sum()
        if "delta_b" in found:
            finite = real & found["delta_b"].isfinite()
            self.budgets += finite.sum()
            self.delta_b += found["delta_b"].where(finite, 0.0).sum(dtype=self.flat.dtype)
        if "masked_by_budget" in found:
            self.by_budget += (found["masked_by_budget"] & mask).sum()
        if "first_exhausted" in found:
            first = found["first_exhausted"]
            slices = SLICES * first.clamp(min=0) // mask.sum(-1).clamp(min=1)
            _scatter(self.exhausted, slices.clamp(max=SLICES - 1), real & (first >= 0))


def _scatter(into: Tensor, index: Tensor, values: Tensor) -> None:
    into.view(-1).index_add_(0, index.flatten(), values.flatten().to(into.dtype))


def largest_tenth(tokens: Tensor, sums: Tensor) -> Tensor:
    """Mean of the largest ``ceil(n / 10)`` of n values in each of N rows, from counts and sums by level, ``[N, L]`` each.

    Exact but for the level that is taken in part, whose own mean stands for all of it: a relative error below ``RESOLUTION``,
    or an absolute one of 2^-20 where values are smaller.  ``[N]``, NaN where n = 0.
    """
    wanted = ((tokens.sum(-1, keepdim=True) + 9) / 10).floor()
    above = tokens.flip(-1).cumsum(-1).flip(-1) - tokens  # values in higher levels
    taken = torch.minimum((wanted - above).clamp(min=0), tokens)
    return (taken * sums / tokens.clamp(min=1)).sum(-1) / wanted.squeeze(-1)


# ---- the stretch with the most dropped tokens -----------------------------------------------------------------------------

_ROWS = ("score", "position", "divergence", "cause", "limit", "effective", "spent", "allowed", "length")


class TokenWindow:
    """``width`` consecutive columns of one response, the ones with the most dropped tokens that were seen, ``[rows, width]``.

    Among windows that dropped as many it is the one with the largest sum of D_t.

    Args:
        values: what :meth:`of` gave.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> TokenWindow:
        """Of no token, which any other is preferred to."""
        return cls(torch.zeros(len(_ROWS), width, device=device))

    @classmethod
    def of(cls, stats: TokenStats, gate: Gate, threshold: float | None, width: int) -> TokenWindow:
        """Of one micro-batch, without waiting for the device."""
        mask, (rows, columns) = stats.mask, stats.mask.shape
        shown = min(width, columns)

        def within(values: Tensor) -> Tensor:
            """Sums over each window, ``[B, T - shown + 1]``."""
            prefix = torch.nn.functional.pad(values.cumsum(-1, dtype=sum_dtype(values.device)), (1, 0))
            return (prefix[:, shown:] - prefix[:, : columns - shown + 1]).clamp(min=0)

        divergence = within(token_divergence(stats, gate))
        scores = within(mask & ~gate.keep) + divergence / (1 + divergence)  # the second is below 1, so the count decides
        best = scores.argmax().view(1)
        start = torch.div(best, scores.shape[1], rounding_mode="floor") * columns + best % scores.shape[1]
        chosen = start + torch.arange(shown, device=mask.device)
        table = cls._table(stats, gate, threshold) | {"score": scores.flatten()[best].expand(rows, columns)}
        values = torch.stack([table[name].reshape(-1)[chosen].float() for name in _ROWS])
        return cls(torch.nn.functional.pad(values, (0, width - shown)))

    @staticmethod
    def _table(stats: TokenStats, gate: Gate, threshold: float | None) -> dict[str, Tensor]:
        """All rows but the score, ``[B, T]`` each; NaN for what the trust region does not have, position 0 where masked."""
        mask, found = stats.mask, gate.diagnostics
        missing = torch.full_like(stats.logp, math.nan)
        limit = missing if threshold is None else token_limit(stats, gate, threshold)
        has_left = found.keys() >= {"budget_allowed", "threshold", "token_weight"}
        has_spent = found.keys() >= {"budget_allowed", "weighted_divergence"}
        return {
            "position": mask.cumsum(-1) * mask,
            "divergence": token_divergence(stats, gate),
            "cause": causes(stats, gate),
            "limit": limit,
            "effective": found["threshold"] / found["token_weight"] if has_left else missing,
            "spent": found["weighted_divergence"].cumsum(-1) if has_spent else missing,
            "allowed": found.get("budget_allowed", missing),
            "length": mask.sum(-1, keepdim=True).expand_as(mask),
        }

    def __or__(self, other: TokenWindow) -> TokenWindow:
        """The one with the larger score, this one if they are equal."""
        return TokenWindow(torch.where(other.values[:1, :1] > self.values[:1, :1], other.values, self.values))

    def rows(self) -> dict[str, Tensor]:
        """By name, where there are tokens; on the CPU."""
        values = self.values.cpu().double()
        return dict(zip(_ROWS, values[:, values[1] > 0], strict=True))


def causes(stats: TokenStats, gate: Gate) -> Tensor:
    """What became of each token, ``[B, T]`` int64 of :class:`Cause`."""
    found, dropped = gate.diagnostics, stats.mask & ~gate.keep
    cause = torch.zeros_like(stats.response_ids)
    if "toward" in found:
        cause = cause.masked_fill(found["toward"], Cause.TOWARD)
    cause = cause.masked_fill(dropped, Cause.DROPPED)
    if "rejected" in found:
        cause = cause.masked_fill(dropped & found["rejected"][:, None], Cause.REJECTED)
    for name, value in (("masked_by_position", Cause.BY_POSITION), ("masked_by_budget", Cause.BY_BUDGET)):
        if name in found:
            cause = cause.masked_fill(dropped & found[name], value)
    return cause
