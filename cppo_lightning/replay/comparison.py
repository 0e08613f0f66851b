"""What several trust regions decide on the same tokens, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cppo_lightning.metrics import bin_names, mask_totals, position_totals

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats
    from cppo_lightning.replay.layout import Place


@dataclass(frozen=True)
class UpdateRates:
    """One update of the run: the metrics of ``MaskRate`` that each trust region would have logged there."""

    rollout: int
    update: int
    step: int
    tokens: int
    rates: dict[str, dict[str, float]]  # name -> tag -> share of the tokens


@dataclass(frozen=True)
class RegionNumbers:
    """One trust region over all tokens.  Shares lie between 0 and 1; N slices of a response's own length."""

    dropped: float
    by_position: float | None  # None where the trust region does not tell causes apart
    by_budget: float | None
    kept_in_halves: list[float | None]  # [2] share of the tokens in that half of their responses
    kept_at: list[float | None]  # [N] share of the slice's tokens; None where no token was
    gradient_at: list[float | None]  # [N] the slice's share of all weight_t |A_t|; 0 everywhere when there is none
    gradient: float  # mean of weight_t |A_t| per token
    unlike_the_run: int  # tokens kept that the run dropped, or the other way round
    other_weights: int  # tokens whose weight is not the run's bit for bit


@dataclass(frozen=True)
class Comparison:
    """R trust regions on the same tokens.

    ``alike[i][j]`` is the share of the tokens that i and j both keep or both drop, ``dropped[i][j]`` the share of the tokens
    dropped by i that j drops too, None where i drops none.
    """

    tokens: int
    responses: int
    bins: list[str]  # slices of the responses' length, in per cent
    regions: dict[str, RegionNumbers]
    alike: list[list[float]]
    dropped: list[list[float | None]]
    updates: list[UpdateRates]


@dataclass
class Tally:
    """Adds up micro-batches.

    Args:
        names: of the trust regions; the first one's gates are the run's own.
        slices: of a response's length.
    """

    names: Sequence[str]
    slices: int
    responses: int = 0
    _sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # name -> metric -> (sum, count)
    _updates: dict[tuple[int, int, int], dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.names)
        self._both = torch.zeros(3, count, count, dtype=torch.float64)  # tokens both keep; both drop; row's drops
        self._unlike = torch.zeros(2, count, dtype=torch.int64)

    def add(self, place: Place, stats: TokenStats, gates: Mapping[str, Gate]) -> None:
        """Take in one micro-batch and each trust region's gate on it."""
        update = self._updates.setdefault(place[:3], {})
        self.responses += len(stats.mask)
        for name, gate in gates.items():
            masks = mask_totals(stats, gate, self.slices)
            gradient = position_totals("gradient", gate.weight * stats.advantages.abs(), stats.mask, self.slices)
            halves = position_totals("kept", gate.keep, stats.mask, 2)
            _add(self._sums.setdefault(name, {}), {**masks, **gradient, **halves})
            _add(update.setdefault(name, {}), {tag: pair for tag, pair in masks.items() if "_at/" not in tag})
        keep = torch.stack([gates[name].keep[stats.mask] for name in self.names]).double()  # [R, tokens]
        drop = 1 - keep
        self._both += torch.stack([keep @ keep.T, drop @ drop.T, drop.sum(-1, keepdim=True).expand(-1, len(keep))])
        weight = torch.stack([gates[name].weight.float()[stats.mask].view(torch.int32) for name in self.names])
        self._unlike += torch.stack([(keep != keep[0]).sum(-1), (weight != weight[0]).sum(-1)])

    def result(self) -> Comparison:
        """Means of everything added."""
        both_keep, both_drop, drops = self._both
        tokens = int(both_keep[0, 0] + both_drop[0, 0])
        return Comparison(
            tokens=tokens,
            responses=self.responses,
            bins=bin_names(self.slices),
            regions={name: self._region(i, name) for i, name in enumerate(self.names)},
            alike=((both_keep + both_drop) / tokens).tolist(),
            dropped=[
                [float(both / mine) if mine else None for both, mine in zip(*rows, strict=True)]
                for rows in zip(both_drop, drops, strict=True)
            ],
            updates=[
                UpdateRates(*place, tokens=int(seen[self.names[0]]["mask/rate"][1]), rates=_all_means(seen))
                for place, seen in sorted(self._updates.items())
            ],
        )

    def _region(self, i: int, name: str) -> RegionNumbers:
        sums = self._sums[name]
        means = _means(sums)
        gradient = torch.stack([sums[f"gradient/{b}"] for b in bin_names(self.slices)])  # [N, 2]
        dropped_at = [means.get(f"mask/rate_at/{b}") for b in bin_names(self.slices)]
        total = float(gradient[:, 0].sum())
        return RegionNumbers(
            dropped=means["mask/rate"],
            by_position=means.get("mask/by_position"),
            by_budget=means.get("mask/by_budget"),
            kept_in_halves=[means.get(f"kept/{b}") for b in bin_names(2)],
            kept_at=[None if share is None else 1 - share for share in dropped_at],
            gradient_at=[float(part / (total or 1)) if count else None for part, count in gradient],
            gradient=total / float(gradient[:, 1].sum()),
            unlike_the_run=int(self._unlike[0, i]),
            other_weights=int(self._unlike[1, i]),
        )


def _add(sums: dict[str, Tensor], totals: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
    for tag, pair in totals.items():
        sums[tag] = sums.get(tag, 0) + torch.tensor([float(value) for value in pair], dtype=torch.float64)


def _means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    return {tag: float(pair[0] / pair[1]) for tag, pair in sums.items() if pair[1]}


def _all_means(seen: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    return {name: _means(sums) for name, sums in seen.items()}
