"""A stretch of one response: what became of each token, under which threshold, and what the prefix had spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cppo_lightning.figures.numbers import Cause
from cppo_lightning.figures.style import (
    BY_BUDGET,
    BY_POSITION,
    DROPPED,
    KEPT,
    REJECTED,
    TEXT,
    TOWARD,
    label,
    legend,
    lone,
    new_figure,
    threshold_name,
    whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import Numbers, ThresholdWindow

_CAUSES = {
    Cause.KEPT: ("kept", KEPT),
    Cause.TOWARD: ("kept, moves back towards µ", TOWARD),
    Cause.BY_POSITION: ("dropped: above the threshold", BY_POSITION),
    Cause.BY_BUDGET: ("dropped: prefix budget spent", BY_BUDGET),
    Cause.REJECTED: ("dropped: whole response rejected", REJECTED),
    Cause.DROPPED: ("dropped", DROPPED),
}


def draw_threshold_window(numbers: ThresholdWindow) -> Figure:
    """Bars of D_t coloured by what became of the token, the thresholds over them, and below, where there is one, the budget.

    The strip under the bars has the same colours, for tokens whose bar is too low to see.
    """
    budget = None if numbers.spent is None or numbers.allowed is None else (numbers.spent, numbers.allowed)
    title = f"What became of each token: {numbers.measure.name}"
    heights, size = ([5], (9.6, 4.4)) if budget is None else ([5, 2], (9.6, 6.0))
    figure, panels = new_figure(title, numbers.note, rows=len(heights), heights=heights, size=size)
    _bars(panels[0], numbers)
    _thresholds(panels[0], numbers)
    label(panels[0], y=f"Dₜ ({numbers.measure.unit})")
    if budget is not None:
        _budget(panels[1], numbers, *budget)
    panels[-1].set_xlim(numbers.position[0] - 0.7, numbers.position[-1] + 0.7)
    whole(panels[-1].xaxis)
    label(panels[-1], x="position t in the response (tokens)")
    legend(figure)
    return figure


def _bars(axes: Axes, numbers: ThresholdWindow) -> None:
    limit = 0.0 if numbers.limit is None else float(numbers.limit.max())
    top = 1.12 * max(limit, float(numbers.divergence.max())) or 1.0
    for cause, (name, colour) in _CAUSES.items():
        chosen = numbers.cause == cause
        if chosen.any():
            position = numbers.position[chosen]
            axes.bar(position, numbers.divergence[chosen], width=0.8, color=colour, linewidth=0, label=name)
            axes.bar(position, 0.035 * top, bottom=-0.06 * top, width=1.0, color=colour, linewidth=0)
    axes.set_ylim(-0.07 * top, top)
    axes.spines["bottom"].set_visible(False)


def _thresholds(axes: Axes, numbers: ThresholdWindow) -> None:
    if numbers.limit is not None:
        line = {"color": TEXT, "linewidth": 1.1, "linestyle": (0, (4, 3)), "alpha": 0.75, "marker": lone(numbers.limit)}
        axes.plot(numbers.position, numbers.limit, label=threshold_name(numbers.limit), **line)
    if numbers.effective is not None:
        left = np.clip(numbers.effective, 0, None)
        line = {"color": TEXT, "linewidth": 1.6, "marker": lone(left), "label": "what the prefix left, cₜ / wₜ"}
        axes.step(numbers.position, left, where="mid", **line)


def _budget(axes: Axes, numbers: ThresholdWindow, spent: Numbers, allowed: Numbers) -> None:
    axes.fill_between(numbers.position, spent, color=BY_BUDGET, alpha=0.2, linewidth=0)
    curves = {"spent by the prefix, Sₜ": (spent, BY_BUDGET, 1.6, "-"), "allowed, δ + δ$_b$ Wₜ₋₁": (allowed, TEXT, 1.3, ":")}
    for name, (values, colour, width, line) in curves.items():
        axes.plot(numbers.position, values, color=colour, linewidth=width, linestyle=line, marker=lone(values), label=name)
    axes.set_ylim(0, None)
    label(axes, y=f"Σ wₜ Dₜ\n({numbers.measure.unit})")
