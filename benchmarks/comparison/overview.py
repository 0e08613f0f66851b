"""All results in one picture: what each method ends at in each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.comparison.grid import Cell, Study
from benchmarks.comparison.outcomes import Cells
from benchmarks.comparison.pairs import BySeed, mean_of
from cppo_lightning.figures.style import (
    BACKGROUND,
    BY_POSITION,
    DPI,
    GRID,
    KEPT,
    MUTED,
    SIZES,
    TEXT,
    legend,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_overview(study: Study, cells: Cells) -> Figure:
    """A column for each cell, a row for each method: final accuracy of each seed, and their mean with its interval."""
    methods = [name for name in study.methods if any(name in found for found in cells.values())]
    size = (1.9 + 1.45 * len(cells), 1.5 + 0.24 * len(methods))  # inches
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Final accuracy on held-out problems", fontsize=SIZES["title"], color=TEXT, fontweight="bold")
    columns = figure.subplots(1, len(cells), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (cell, found) in zip(columns, cells.items(), strict=True):
        _column(axes, cell, study)
        for row, method in enumerate(methods):
            if method in found:
                _row(axes, row, found[method], method == study.definitions.reference)
        start = np.mean([outcome.initial for outcomes in found.values() for outcome in outcomes.values()])
        axes.axvline(float(start), color=MUTED, linewidth=0.9, linestyle=":", label="before training")
        below = study.definitions.collapsed_below * float(start)
        axes.axvspan(0, below, color=GRID, alpha=0.35, linewidth=0, label="collapsed")
    columns[0].set_yticks(range(len(methods)), [name.replace("cppo_", "cppo: ").replace("_", " ") for name in methods])
    columns[0].set_ylim(len(methods) - 0.4, -0.6)  # the first one at the top
    legend(figure, columns=4 if len(cells) > 2 else 2)
    return figure


def _column(axes: Axes, cell: Cell, study: Study) -> None:
    plain(axes)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(axis="y", length=0)
    name = f"{cell.task.replace('_', ' ')}\nlr {cell.learning_rate:g}, reuse {cell.reuse}"
    axes.set_title(name, fontsize=SIZES["tick"], color=TEXT)


def _row(axes: Axes, row: int, outcomes: BySeed, reference: bool) -> None:
    finals = [outcome.final for outcome in outcomes.values()]
    mean = mean_of(finals)
    colour = BY_POSITION if reference else TEXT
    axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)
    axes.plot(finals, [row] * len(finals), "o", color=KEPT, markersize=3.6, alpha=0.6, linewidth=0, label="one seed", zorder=3)
    axes.plot([mean.mean], [row], "|", color=colour, markersize=10, markeredgewidth=2.2, zorder=4)
    if not reference:
        axes.plot([], [], color=TEXT, marker="|", markersize=10, markeredgewidth=2.2, label="mean and its 95 % interval")
