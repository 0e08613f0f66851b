"""The tables of docs/comparison.md, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.comparison.cost import Cost
from benchmarks.comparison.grid import Cell, Study
from benchmarks.comparison.outcomes import Cells, Stability, stability
from benchmarks.comparison.pairs import LEVEL, BySeed, Mean, Pair, mean_of, paired, pairs, separates


def tables(study: Study, cells: Cells, cost: Cost) -> dict[str, str]:
    """By the name of their place on the page."""
    parted = {cell: separates(methods, study.definitions) for cell, methods in cells.items()}
    pages = [_pairs(study, cell, cells[cell]) for cell in cells if parted[cell]]
    return {
        "cost": _cost(study, cells, cost),
        "stable": _stable(study, cells),
        "cells": "\n\n".join(_cell(study, cell, methods, parted[cell]) for cell, methods in cells.items()),
        "pairs": "\n\n".join(pages) or "No cell separates the methods.",
    }


def _cost(study: Study, cells: Cells, cost: Cost) -> str:
    """How much of the grid is there, and what that took."""
    declared = _declared(study)
    runs = sum(len(outcomes) for methods in cells.values() for outcomes in methods.values())
    of = sum(len(seeds) for methods in declared.values() for seeds in methods.values())
    share = f"All {of} declared runs are in" if runs == of else f"{runs} of {of} declared runs are in ({runs / of:.0%})"
    rows = []
    for cell, methods in declared.items():
        there = cells.get(cell, {})
        ran = sum(len(outcomes) for outcomes in there.values())
        whole = sum(len(there.get(method, ())) == len(seeds) for method, seeds in methods.items())
        rows.append([str(cell), f"{ran} of {sum(map(len, methods.values()))}", f"{whole} of {len(methods)}"])
    hours = cost.core_seconds / 3600
    took = f"{share}: {hours:.1f} core hours, {hours / cost.cores:.1f} hours on {cost.cores} cores, of {cost.machine}."
    return f"{took}\n\n{markdown(['cell', 'runs', 'methods with all their seeds'], rows)}"


def _declared(study: Study) -> dict[Cell, dict[str, list[int]]]:
    """Seeds by cell and method."""
    found: dict[Cell, dict[str, list[int]]] = {cell: {} for cell in study.cells}
    for run in study.runs():
        found[run.cell].setdefault(run.method, []).append(run.seed)
    return found


def _cell(study: Study, cell: Cell, methods: Mapping[str, BySeed], parted: bool) -> str:
    definitions, declared = study.definitions, _declared(study)[cell]
    reference = methods.get(definitions.reference, {})
    header = ["method", "seeds", "final accuracy", "best", "collapsed"]
    header += [f"final, minus {definitions.reference}'s", "best, minus its"] if reference else []
    rows = []
    for name, outcomes in methods.items():
        found = list(outcomes.values())
        row = [name, _of(len(found), len(declared[name]))]
        row += [_interval(mean_of([o.final for o in found])), _interval(mean_of([o.best for o in found]))]
        row.append(f"{sum(o.collapsed for o in found)} of {len(found)}")
        if reference:
            own = name == definitions.reference
            row += ["", ""] if own else [_difference(paired(outcomes, reference, what)) for what in ("final", "best")]
        rows.append(row)
    start = np.mean([o.initial for outcomes in methods.values() for o in outcomes.values()])
    said = [f"Starts at {start:.3f}; {_verdict(study, methods, parted)}.", *_failures(methods)]
    return f"{_heading(cell)}\n\n{' '.join(said)}\n\n{markdown(header, rows)}"


def _verdict(study: Study, methods: Mapping[str, BySeed], parted: bool) -> str:
    words = "separates the methods" if parted else "does not separate the methods"
    if parted and min(map(len, methods.values())) < study.definitions.seeds:
        words += f", with fewer than the {study.definitions.seeds} seeds that it should have"
    return words


def _failures(methods: Mapping[str, BySeed]) -> list[str]:
    failed = [o for outcomes in methods.values() for o in outcomes.values() if o.failure]
    return [f"{o.run.method} failed with seed {o.run.seed}: {' '.join(str(o.failure).split())[:300]}." for o in failed]


def _of(some: int, all_: int) -> str:
    return str(some) if some == all_ else f"{some} of {all_}"


def _stable(study: Study, cells: Cells) -> str:
    """A table for each task and reuse: runs that collapsed at each learning rate, and the largest stable one."""
    parts = []
    for (task, reuse), found in stability(cells, study.definitions).items():
        rates = sorted({rate for method in found.values() for rate in method.collapsed})
        rows = []
        for method in (name for name in study.methods if name in found):
            counts = [found[method].collapsed.get(rate) for rate in rates]
            rows.append([method, *("" if count is None else f"{count[0]} of {count[1]}" for count in counts)])
            rows[-1].append(_largest(found[method]))
        if rows:
            header = ["collapsed runs", *(f"{rate:g}" for rate in rates), "largest stable learning rate"]
            parts.append(f"### {task}, reuse {reuse}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) or "No method has run at several learning rates."


def _largest(method: Stability) -> str:
    if method.largest is None:
        return "below those tried"
    return f"{method.largest:g}" + (", the largest tried" if method.unbounded else "")


def _pairs(study: Study, cell: Cell, methods: Mapping[str, BySeed]) -> str:
    found = pairs(methods, study.definitions)
    # the best first, so that most differences above the diagonal are positive
    names = sorted(methods, key=lambda name: -float(np.mean([o.final for o in methods[name].values()])))
    entries = {(p.first, p.second): _entry(p, 1) for p in found} | {(p.second, p.first): _entry(p, -1) for p in found}
    rows = [
        [f"{i + 1} {first}", *("" if j <= i else entries.get((first, names[j]), "none") for j in range(1, len(names)))]
        for i, first in enumerate(names)
    ]
    enough = study.definitions.seeds
    few = sum(pair.difference.seeds < enough for pair in found)
    said = (
        f"Pairs: {len(found)}; of fewer than {enough} seeds, which get no star: {few}. The interval excludes zero (\\*): "
        f"{sum(pair.excludes_zero for pair in found)}. Further apart than any two of {len(methods)} equal methods are in "
        f"{LEVEL:.0%} of cases (†): {sum(pair.beyond_chance for pair in found)}."
    )
    header = ["row minus column", *map(str, range(2, len(names) + 1))]
    return f"{_heading(cell)}\n\n{said}\n\n{markdown(header, rows)}"


def _entry(pair: Pair, sign: int) -> str:
    return f"{sign * pair.difference.mean:+.2f}" + "\\*" * pair.excludes_zero + "†" * pair.beyond_chance


def _difference(mean: Mean | None) -> str:
    return "no seed in common" if mean is None else _interval(mean, signed=True)


def _interval(mean: Mean, signed: bool = False) -> str:
    shown = "{:+.3f}" if signed else "{:.3f}"
    interval = f" [{shown}, {shown}]" if mean.seeds > 1 else ""
    return f"{shown}{interval}".format(mean.mean, mean.low, mean.high)


def _heading(cell: Cell) -> str:
    return f"### {cell}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
