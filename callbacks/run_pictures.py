"""From sums to pictures: the numbers that each is drawn of, and which of them there are to draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cppo_lightning.divergences import BinaryTV, Divergence
from cppo_lightning.figures.numbers import (
    BudgetOverSteps,
    Cause,
    DivergenceByPosition,
    FirstExhaustion,
    MaskHeatMap,
    Measure,
    Numbers,
    ThresholdWindow,
)
from cppo_lightning.positions import PositionBins, PositionSums, TokenWindow, largest_tenth

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from cppo_lightning.history import SumHistory


def measure_of(trust_region: Any, own: bool) -> Measure:
    """What D_t is: the trust region's ``divergence`` (an intersection's first), or |pi - mu| if it has none of its own."""
    if not own:
        return Measure(BinaryTV().title, BinaryTV.unit)
    for region in (trust_region, *getattr(trust_region, "trust_regions", ())):
        if isinstance(divergence := getattr(region, "divergence", None), Divergence):
            return Measure(divergence.title, divergence.unit)
    return Measure(f"divergence of {type(trust_region).__name__}", Divergence.unit)


def of_rollout(sums: PositionSums, window: TokenWindow, measure: Measure, note: str) -> Iterator[tuple[str, Figure]]:
    """Name and picture of what there is to see of one rollout."""
    from cppo_lightning.figures.divergence_by_position import draw_divergence_by_position
    from cppo_lightning.figures.first_exhaustion import draw_first_exhaustion
    from cppo_lightning.figures.threshold_window import draw_threshold_window

    responses = int(sums.responses)
    if sums.divergence.any():
        profile = divergence_by_position(sums, measure, f"{note}; {responses} responses")
        yield "divergence_by_position", draw_divergence_by_position(profile)
        yield "threshold_window", draw_threshold_window(threshold_window(window, measure, note))
    if sums.exhausted.any():
        yield "first_exhausted", draw_first_exhaustion(FirstExhaustion(_numpy(sums.exhausted), responses, note))


def of_run(history: SumHistory, bins: PositionBins, measure: Measure) -> Iterator[tuple[str, Figure]]:
    """Name and picture of what there is to see of a run so far."""
    from cppo_lightning.figures.budget_over_steps import draw_budget_over_steps
    from cppo_lightning.figures.mask_heat_map import draw_mask_heat_map

    tokens, dropped, (budgets, delta_b, by_budget) = _columns(history.table(), bins)
    note = f"for each {history.per_row} rollouts" if history.per_row > 1 else "for each rollout"
    if dropped.any():
        steps = np.array([*history.starts, history.ends[-1]], dtype=np.float64)
        yield (
            "mask_heat_map",
            draw_mask_heat_map(MaskHeatMap(steps, _edges(bins), _numpy(dropped / tokens), f"a column {note}")),
        )
    if budgets.any():
        ends = np.array(history.ends, dtype=np.float64)
        shares = _numpy(delta_b / budgets), _numpy(by_budget / dropped.sum(-1))
        yield "budget", draw_budget_over_steps(BudgetOverSteps(ends, *shares, measure.unit, f"a point {note}"))


def history_row(sums: PositionSums) -> Tensor:
    """What pictures over the run need of one rollout, ``[C]``."""
    return torch.cat([sums.tokens.sum(-1), sums.dropped, sums.budgets, sums.delta_b, sums.by_budget])


def _columns(table: Tensor, bins: PositionBins) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Rows of :func:`history_row`, ``[R, C]``, taken apart: tokens and dropped ``[R, N]``, and the rest ``[R]`` each."""
    tokens, dropped, rest = table.split([bins.count, bins.count, 3], dim=-1)
    return tokens, dropped, rest.unbind(-1)


def divergence_by_position(sums: PositionSums, measure: Measure, note: str) -> DivergenceByPosition:
    """Means by position over a rollout's tokens."""
    tokens = sums.tokens.sum(-1)
    return DivergenceByPosition(
        edges=_edges(sums.bins),
        mean=_numpy(sums.divergence.sum(-1) / tokens),
        largest_tenth=_numpy(largest_tenth(sums.tokens, sums.divergence)),
        limit=_numpy(sums.limit / tokens) if sums.limit.any() else None,
        measure=measure,
        note=note,
    )


def threshold_window(window: TokenWindow, measure: Measure, note: str) -> ThresholdWindow:
    """One response's tokens; ``note`` is completed with which of how many they are."""
    rows = {name: _numpy(values) for name, values in window.rows().items()}
    position = rows["position"]
    which = f"tokens {position[0]:.0f} to {position[-1]:.0f} of a response of {rows['length'][0]:.0f}"
    picked = "where most were dropped" if (rows["cause"] >= Cause.BY_POSITION).any() else "none of them dropped"

    def given(name: str) -> Numbers | None:
        return None if np.isnan(rows[name]).any() else rows[name]

    return ThresholdWindow(
        position=position,
        divergence=rows["divergence"],
        cause=rows["cause"].astype(np.int64),
        limit=given("limit"),
        effective=given("effective"),
        spent=given("spent"),
        allowed=given("allowed"),
        measure=measure,
        note=f"{note}; {which}, {picked}",
    )


def _edges(bins: PositionBins) -> Numbers:
    return np.arange(bins.count + 1, dtype=np.float64) * bins.width + 0.5


def _numpy(values: Tensor) -> Numbers:
    return values.double().numpy()
