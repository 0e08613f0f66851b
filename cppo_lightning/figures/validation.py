"""Accuracy on held-out problems over a run, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.figures.style import PANEL, SERIES, label, legend, new_figure, percent, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")  # for more curves than colours


@dataclass(frozen=True)
class Curve:
    """One quantity at each evaluation; all four have one number per evaluation, the last three as shares between 0 and 1."""

    name: str
    steps: Sequence[int]  # optimizer steps taken
    values: Sequence[float]
    low: Sequence[float]  # ends of the interval
    high: Sequence[float]


def validation_curves(curves: Sequence[Curve]) -> Figure:
    """Each curve as points and a line over optimizer steps, in a band that is its interval (a bar where it has one point)."""
    figure, (axes,) = new_figure("Accuracy on held-out problems", "bands: 95 % bootstrap intervals over problems")
    for i, curve in enumerate(curves):
        color, dash = SERIES[i % len(SERIES)], _DASHES[i // len(SERIES) % len(_DASHES)]
        look = {"color": color, "linestyle": dash, "linewidth": 1.8, "marker": "o", "markersize": 5, "markeredgecolor": PANEL}
        axes.plot(curve.steps, curve.values, label=curve.name, zorder=3, **look)
        if len(curve.steps) > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.14, linewidth=0)
        else:
            axes.vlines(curve.steps, curve.low, curve.high, color=color, alpha=0.5, linewidth=1.8)
    axes.set_ylim(bottom=0)
    whole(axes.xaxis)
    percent(axes)
    label(axes, "optimizer steps", "share of correct answers")
    legend(figure)
    return figure
