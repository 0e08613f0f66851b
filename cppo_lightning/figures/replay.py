"""Several trust regions on the same tokens."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import PercentFormatter

from cppo_lightning.figures.style import HEAT, PANEL, SERIES, SIZES, TEXT, label, legend, lone, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import Numbers, RegionsAgreement, RegionsByPosition

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # curves often lie on each other


def draw_kept_by_position(numbers: RegionsByPosition) -> Figure:
    """The share of tokens that each trust region keeps, along the responses."""
    figure, (axes,) = new_figure("Tokens kept, by position in the response", numbers.note)
    _curves(axes, numbers, "kept, share of the slice's tokens")
    legend(figure)
    return figure


def draw_gradient_by_position(numbers: RegionsByPosition) -> Figure:
    """Where in the responses the gradient comes from: each slice's share of all weight_t |A_t|, by trust region."""
    figure, (axes,) = new_figure("Gradient weight, by position in the response", numbers.note)
    _curves(axes, numbers, "share of the sum of weightₜ |Aₜ|")
    axes.set_ylim(0)
    legend(figure)
    return figure


def _curves(axes: Axes, numbers: RegionsByPosition, meaning: str) -> None:
    slices = numbers.shares.shape[1]
    middle = (np.arange(slices) + 0.5) / slices
    styles = zip(numbers.names, numbers.shares, cycle(SERIES), cycle(_DASHES), strict=False)
    for i, (name, shares, colour, dash) in enumerate(styles):
        width = 3.4 if i == 0 else 1.6  # the first, which is the run's own, shows beneath the others
        there = np.isfinite(shares)  # short responses leave slices without a token
        look = {"color": colour, "linestyle": dash, "linewidth": width, "marker": lone(shares[there]), "label": name}
        axes.plot(middle[there], shares[there], **look)
    axes.set_xlim(0, 1)
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    percent(axes)
    label(axes, "position, share of the response's own length", meaning)


def draw_agreement(numbers: RegionsAgreement) -> Figure:
    """Two matrices: tokens on which two trust regions decide alike, and tokens dropped by one that the other drops too."""
    side = 1.6 + 0.5 * len(numbers.names)  # inches
    figure, panels = new_figure("How alike the trust regions decide", numbers.note, rows=2, size=(side + 4.4, 2 * side + 1))
    _matrix(panels[0], numbers.names, numbers.alike, "both keep or both drop:\nshare of all tokens")
    _matrix(panels[1], numbers.names, numbers.dropped, "the column drops it too:\nshare of what the row drops")
    panels[1].set_xticks(range(len(numbers.names)), numbers.names, rotation=30, ha="right", rotation_mode="anchor")
    return figure


def _matrix(axes: Axes, names: tuple[str, ...], values: Numbers, meaning: str) -> None:
    axes.grid(False)
    axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1.4, cmap=HEAT, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = PANEL if value > 0.5 else TEXT
        text = "none" if np.isnan(value) else f"{value:.1%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=SIZES["tick"], color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    label(axes, y=meaning)
