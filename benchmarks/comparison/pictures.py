"""The pictures of a study's page, in the style of the project's other ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.comparison.grid import Cell, Study
from benchmarks.comparison.outcomes import Cells
from benchmarks.comparison.pairs import separates
from benchmarks.comparison.results import AT, BINS, BUDGET_AT, EVALUATION, STEPS, Result
from cppo_lightning.figures.numbers import Numbers
from cppo_lightning.figures.style import (
    BACKGROUND,
    BY_BUDGET,
    BY_POSITION,
    DPI,
    DROPPED,
    KEPT,
    MUTED,
    SIZES,
    TEXT,
    legend,
    percent,
    plain,
    to_png,
)
from cppo_lightning.metrics import bin_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

COLUMNS = 6

Panels = Mapping[Cell, Mapping[str, Sequence[Result]]]  # cell -> method -> one of each seed


def pictures(study: Study, results: Sequence[Result], cells: Cells, page: Path) -> dict[Path, str]:
    """Draw, for each task, accuracy over rollouts, and for its cells that separate the methods where tokens are dropped and
    how much of the budget is spent; returns the files, which lie beside the page, with their titles."""
    written: dict[Path, str] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        parted = [cell for cell in own if separates(cells[cell], study.definitions)] or own[:1]
        reference = study.definitions.reference
        drawn = {"accuracy": draw_accuracy(panels(results, own), reference), "masks": draw_masks(panels(results, parted))}
        if (budget := draw_budget(panels(results, parted))) is not None:
            drawn["budget"] = budget
        for name, figure in drawn.items():
            file = page.with_name(f"{page.stem}-{task.replace('_', '-')}-{name}.png")
            written[file] = f"{task}: {figure.get_suptitle()}"
            to_png(figure, file)
    return written


def panels(results: Sequence[Result], cells: Sequence[Cell]) -> Panels:
    """The results of some cells, methods in the order in which they are there."""
    found: dict[Cell, dict[str, list[Result]]] = {cell: {} for cell in cells}
    for result in results:
        if result.run.cell in found:
            found[result.run.cell].setdefault(result.run.method, []).append(result)
    return found


def draw_accuracy(numbers: Panels, reference: str) -> Figure:
    """Accuracy on held-out problems over rollouts: a panel for each method of each cell, a line for each seed."""
    figure, grid = _grid(numbers, "Accuracy on held-out problems over rollouts")
    for axes, cell, found in grid:
        curves = [result.curves[EVALUATION] for result in found]
        for curve in curves:
            axes.plot(*_measured(curve), color=KEPT, linewidth=0.7, alpha=0.55, label="one seed")
        axes.plot(*_measured(_mean(curves)), color=TEXT, linewidth=1.8, label="mean over seeds")
        if beside := numbers[cell].get(reference):
            mean = _mean([result.curves[EVALUATION] for result in beside])
            axes.plot(*_measured(mean), color=BY_POSITION, linewidth=1.4, linestyle="--", label=f"{reference}'s mean")
        axes.set_ylim(0, 1)
        percent(axes)
    legend(figure)
    return figure


def draw_masks(numbers: Panels) -> Figure:
    """Share of tokens dropped by position in the response, by cause where the trust region tells it."""
    figure, grid = _grid(numbers, "Dropped tokens by position (% of the response)")
    middle = 100 * (np.arange(BINS) + 0.5) / BINS
    for axes, _, found in grid:
        dropped, by_budget = (
            np.array([_over_run(found, f"{tag}/{name}") for name in bin_names(BINS)]) for tag in (AT, BUDGET_AT)
        )
        tells = np.isfinite(by_budget).any()
        by_budget = np.nan_to_num(by_budget)
        bars = {"width": 92 / BINS, "linewidth": 0}
        colour, name = (BY_POSITION, "above the threshold") if tells else (DROPPED, "dropped, cause not told apart")
        axes.bar(middle, dropped - by_budget, color=colour, label=name, **bars)
        if tells:
            axes.bar(middle, by_budget, bottom=dropped - by_budget, color=BY_BUDGET, label="prefix budget spent", **bars)
        if not np.nansum(dropped):
            axes.text(0.5, 0.5, "drops none", transform=axes.transAxes, ha="center", fontsize=SIZES["tick"], color=MUTED)
    _from_zero(figure)
    legend(figure)
    return figure


def draw_budget(numbers: Panels) -> Figure | None:
    """Share of the allowed prefix budget that responses spend, over rollouts; None if no method has one.

    Each panel has a y-axis of its own: a budget of KL is overspent thirty times where one of TV is not spent.
    """
    spent, exhausted = "budget/spent_mean", "budget/exhausted_share"
    have = {
        cell: {
            method: found
            for method, found in methods.items()
            if any(np.isfinite(result.curves[spent]).any() for result in found)
        }
        for cell, methods in numbers.items()
    }
    have = {cell: methods for cell, methods in have.items() if methods}
    if not have:
        return None
    figure, grid = _grid(have, "Prefix budget over rollouts, mean over seeds", shared=False)
    for axes, _, found in grid:
        for tag, colour, name in (
            (spent, BY_BUDGET, "spent, share of what a response was allowed"),
            (exhausted, MUTED, "responses whose budget ran out"),
        ):
            axes.plot(_mean([result.curves[tag] for result in found]), color=colour, linewidth=1.6, label=name)
    _from_zero(figure)
    legend(figure)
    return figure


def _measured(curve: Numbers) -> tuple[NDArray[np.intp], Numbers]:
    """Rollouts after which there is a value, and these."""
    there = np.flatnonzero(np.isfinite(curve))
    return there, curve[there]


def _mean(curves: Sequence[Numbers]) -> Numbers:
    """Over seeds, at each rollout that any of them has; NaN where none was measured."""
    table = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    return np.ma.masked_invalid(table).mean(0).filled(np.nan)


def _over_run(found: Sequence[Result], tag: str) -> float:
    """Mean over the optimizer steps of all rollouts; NaN if never measured."""
    values, steps = (np.concatenate([result.curves[name] for result in found]) for name in (tag, STEPS))
    there = np.isfinite(values) & (steps > 0)
    return float(np.average(values[there], weights=steps[there])) if there.any() else float("nan")


def _grid(numbers: Panels, title: str, shared: bool = True) -> tuple[Figure, list[tuple[Axes, Cell, Sequence[Result]]]]:
    """A figure with a panel for each method, the cells one below the other, each with a y-axis of its own, or each panel."""
    columns = min(COLUMNS, max(map(len, numbers.values())))
    rows = {cell: math.ceil(len(methods) / columns) for cell, methods in numbers.items()}
    size = (max(2.1 * columns, 7.0), 1.1 + 1.5 * sum(rows.values()) + 0.3 * len(rows))  # inches
    figure = Figure(figsize=size, dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=SIZES["title"], color=TEXT, fontweight="bold")
    grid = iter(figure.subplots(sum(rows.values()), columns, sharex=True, squeeze=False))
    found: list[tuple[Axes, Cell, Sequence[Result]]] = []
    for cell, methods in numbers.items():
        places = [axes for row in islice(grid, rows[cell]) for axes in row]
        for axes in places[len(methods) :]:
            axes.remove()
        for place, (axes, (method, results)) in enumerate(zip(places, methods.items(), strict=False)):
            _panel(axes, places[0] if shared else axes, place % columns == 0, place + columns >= len(methods))
            above = "\n" if place < columns else ""  # room for the cell's name
            name = above + method.replace("cppo_", "cppo: ").replace("_", " ")
            axes.set_title(name, fontsize=SIZES["subtitle"], color=TEXT)
            found.append((axes, cell, results))
        named = f"learning rate {cell.learning_rate:g}, reuse {cell.reuse}"
        style = {"fontsize": SIZES["label"], "color": TEXT, "fontweight": "bold"}
        written = places[0].annotate(named, (0, 1), (0, 20), "axes fraction", "offset points", annotation_clip=False, **style)
        written.set_in_layout(False)  # else the first column would be as wide as the name
    return figure, found


def _from_zero(figure: Figure) -> None:
    """Once all is drawn: a limit that is set ends the search for the other one."""
    for axes in figure.axes:
        axes.set_ylim(0)
        percent(axes)


def _panel(axes: Axes, first: Axes, leftmost: bool, lowest: bool) -> None:
    """With the y-axis of the cell's first panel, and numbers where no panel is to the left or below."""
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if axes is not first:
        axes.sharey(first)
    axes.tick_params(labelleft=leftmost or axes is first, labelbottom=lowest)
