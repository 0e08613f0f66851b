"""The pictures of docs/comparison.md, in the style of the project's other ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.comparison.grid import Cell, Study
from benchmarks.comparison.outcomes import Cells, separates
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
    label,
    legend,
    percent,
    plain,
    to_png,
)
from cppo_lightning.metrics import bin_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panels = Mapping[str, Mapping[Cell, Sequence[Result]]]  # method -> cell -> one of each seed


def pictures(study: Study, results: Sequence[Result], cells: Cells, docs: Path) -> dict[Path, str]:
    """Draw, for each task, accuracy over rollouts, and for its cells that separate the methods where tokens are dropped and
    how much of the budget is spent; returns the files with their titles."""
    written: dict[Path, str] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        parted = [cell for cell in own if separates(cells[cell], study.definitions)] or own[:1]
        drawn = {"accuracy": draw_accuracy(panels(results, own)), "masks": draw_masks(panels(results, parted))}
        if (budget := draw_budget(panels(results, parted))) is not None:
            drawn["budget"] = budget
        for name, figure in drawn.items():
            file = docs / f"comparison-{task.replace('_', '-')}-{name}.png"
            written[file] = f"{task}: {figure.get_suptitle()}"
            to_png(figure, file)
    return written


def panels(results: Sequence[Result], cells: Sequence[Cell]) -> Panels:
    """The results of some cells, by method, in the order in which they are there."""
    found: dict[str, dict[Cell, list[Result]]] = {}
    for cell in cells:
        for result in results:
            if result.run.cell == cell:
                found.setdefault(result.run.method, {}).setdefault(cell, []).append(result)
    return found


def draw_accuracy(numbers: Panels) -> Figure:
    """Accuracy on held-out problems over rollouts: a row for each method, a column for each cell, a line for each seed."""
    figure, grid = _grid(
        numbers, "Accuracy on held-out problems: thin lines are seeds, the thick one is their mean", "rollouts"
    )
    for axes, found in grid:
        curves = [result.curves[EVALUATION] for result in found]
        for curve in curves:
            there = np.flatnonzero(np.isfinite(curve))
            axes.plot(there, curve[there], color=KEPT, linewidth=0.7, alpha=0.55)
        mean = _mean(curves)
        there = np.flatnonzero(np.isfinite(mean))
        axes.plot(there, mean[there], color=TEXT, linewidth=1.8)
        axes.set_ylim(0, 1)
        percent(axes)
    return figure


def draw_masks(numbers: Panels) -> Figure:
    """Share of tokens dropped by position in the response, by cause where the trust region tells it."""
    figure, grid = _grid(
        numbers, "Dropped tokens by position in the response, all rollouts and seeds", "position (% of the response)"
    )
    middle = 100 * (np.arange(BINS) + 0.5) / BINS
    for axes, found in grid:
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
        percent(axes)
    legend(figure)
    return figure


def draw_budget(numbers: Panels) -> Figure | None:
    """Share of the allowed prefix budget that responses spend, over rollouts; None if no method has one."""
    spent, exhausted = "budget/spent_mean", "budget/exhausted_share"
    have = {
        method: found
        for method, found in numbers.items()
        if any(np.isfinite(result.curves[spent]).any() for results in found.values() for result in results)
    }
    if not have:
        return None
    figure, grid = _grid(have, "Prefix budget over rollouts, mean over seeds", "rollouts")
    for axes, found in grid:
        for tag, colour, name in (
            (spent, BY_BUDGET, "spent, share of what a response was allowed"),
            (exhausted, MUTED, "responses whose budget ran out"),
        ):
            axes.plot(_mean([result.curves[tag] for result in found]), color=colour, linewidth=1.6, label=name)
        axes.set_ylim(0)
        percent(axes)
    legend(figure)
    return figure


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


def _grid(numbers: Panels, title: str, x: str) -> tuple[Figure, list[tuple[Axes, Sequence[Result]]]]:
    """A figure with a row for each method and a column for each cell, and its panels that have results."""
    columns = sorted({cell for found in numbers.values() for cell in found})
    size = (1.6 + 2.6 * len(columns), 1.4 + 1.15 * len(numbers))  # inches
    figure = Figure(figsize=(max(size[0], 7.0), size[1]), dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=SIZES["title"], color=TEXT, fontweight="bold")
    grid = figure.subplots(len(numbers), len(columns), sharex=True, sharey=True, squeeze=False)
    found = []
    for (method, cells), row in zip(numbers.items(), grid, strict=True):
        row[0].set_ylabel(method.replace("_", "\n", 1), fontsize=SIZES["tick"], color=TEXT, rotation=0, ha="right", va="center")
        for cell, axes in zip(columns, row, strict=True):
            plain(axes)
            if cell in cells:
                found.append((axes, cells[cell]))
            else:
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", fontsize=SIZES["tick"], color=MUTED)
    for cell, axes, last in zip(columns, grid[0], grid[-1], strict=True):
        label(last, x=x)
        axes.set_title(f"learning rate {cell.learning_rate:g}, reuse {cell.reuse}", fontsize=SIZES["subtitle"], color=TEXT)
    return figure, found
