"""docs/comparison.md: the tables between its markers, and the pictures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.comparison.grid import Study
from benchmarks.comparison.outcomes import (
    LEVEL,
    Cells,
    Mean,
    Outcome,
    Pair,
    by_cell,
    final_mean,
    mean_of,
    outcome,
    paired,
    pairs,
    separates,
    stable_learning_rates,
    unpaired,
)
from benchmarks.comparison.results import Result, read
from cppo_lightning.errors import ConfigError
from cppo_lightning.untrusted import whole_file

PAGE = "comparison.md"
_MARKED = "<!-- made by python -m benchmarks.comparison report: {} -->"


def write_report(study: Study, results_file: Path, docs: Path) -> list[Path]:
    """Renew the page's tables and pictures; returns the files written.

    Raises:
        ConfigError: results that cannot be read, that miss a run of the study, or whose runs are not paired; or a page without
            markers.
    """
    from benchmarks.comparison.pictures import pictures

    results = read(results_file)
    _check(study, results)
    cells = by_cell([outcome(result, study.definitions) for result in results])
    parts = tables(study, cells, json.loads(results_file.with_suffix(".json").read_text()))
    drawn = pictures(study, results, cells, docs)
    parts["pictures"] = "\n\n".join(f"![{words}]({file.name})" for file, words in drawn.items())
    page = docs / PAGE
    text = page.read_text() if page.exists() else ""
    for name, part in parts.items():
        text = replaced(text, name, part)
    with whole_file(page) as file:
        file.write(text.encode())
    return [page, *drawn]


def _check(study: Study, results: Sequence[Result]) -> None:
    if missing := sorted({run.name for run in study.runs()} - {result.run.name for result in results}):
        raise ConfigError(f"--results lacks {len(missing)} runs of the study, the first of them {missing[0]}")
    if wrong := unpaired(results):
        raise ConfigError(f"{wrong[0]} and {len(wrong) - 1} more began with other weights or samples than others of their seed")


def replaced(page: str, name: str, part: str) -> str:
    """The page with ``part`` between the two markers called ``name``.

    Raises:
        ConfigError: the page does not have them.
    """
    begin, end = (_MARKED.format(f"{name}{edge}") for edge in ("", ", end"))
    if begin not in page or end not in page:
        raise ConfigError(f"{PAGE} has no place for {name}: it needs the lines {begin!r} and {end!r}")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{part}\n\n{end}", page, flags=re.DOTALL)


def tables(study: Study, cells: Cells, cost: Mapping[str, float]) -> dict[str, str]:
    """Markdown by the name of its place on the page."""
    parted = {cell: separates(methods, study.definitions) for cell, methods in cells.items()}
    return {
        "cost": f"{cost['runs']} runs, {cost['core_seconds'] / 3600:.1f} core hours, {cost['seconds'] / 3600:.1f} hours on "
        f"{cost['cores']} cores: {cost['machine']}.",
        "stable": _stable(study, cells),
        "cells": "\n\n".join(_cell(study, str(cell), methods, parted[cell]) for cell, methods in cells.items()),
        "pairs": "\n\n".join(_pairs(str(cell), cells[cell]) for cell in cells if parted[cell])
        or "No cell separates the methods.",
    }


def _cell(study: Study, title: str, methods: Mapping[str, Mapping[int, Outcome]], parted: bool) -> str:
    definitions = study.definitions
    reference = methods.get(definitions.reference)
    header = ["method", "seeds", "final accuracy", "best", "collapsed"]
    header += [f"final, minus {definitions.reference}'s"] if reference else []
    rows = []
    for name, outcomes in methods.items():
        found = list(outcomes.values())
        row = [name, str(len(found)), _interval(mean_of([o.final for o in found])), _interval(mean_of([o.best for o in found]))]
        row.append(f"{sum(o.collapsed for o in found)} of {len(found)}" + _failed(found))
        if reference:
            row.append("" if name == definitions.reference else _interval(paired(outcomes, reference), signed=True))
        rows.append(row)
    first = next(iter(methods.values()))
    verdict = "separates the methods" if parted else "does not separate the methods"
    few = min(map(len, methods.values()))
    if parted and few < definitions.seeds:
        verdict += f", with fewer than the {definitions.seeds} seeds that it should have"
    start = mean_of([o.initial for o in first.values()]).mean
    return f"### {title[0].upper()}{title[1:]}\n\nStarts at {start:.3f}; {verdict}.\n\n{markdown(header, rows)}"


def _failed(outcomes: Sequence[Outcome]) -> str:
    failed = sum(o.failed for o in outcomes)
    return f", {failed} failed" if failed else ""


def _stable(study: Study, cells: Cells) -> str:
    found = stable_learning_rates(cells, study.definitions)
    places = [place for place in found if found[place]]
    rows = [
        [method, *(_rate(found[place][method]) if method in found[place] else "" for place in places)]
        for method in study.methods
        if any(method in found[place] for place in places)
    ]
    return markdown(["method", *(f"{task}, reuse {reuse}" for task, reuse in places)], rows)


def _rate(rate: float | None) -> str:
    return "none tried" if rate is None else f"{rate:g}"


def _pairs(title: str, methods: Mapping[str, Mapping[int, Outcome]]) -> str:
    found = pairs(methods)
    intervals = sum(pair.difference.excludes_zero for pair in found)
    beyond = sum(pair.beyond_chance for pair in found)
    # the best first, so that signs are above the diagonal
    names = sorted(methods, key=lambda name: -final_mean(methods[name]))
    entries = {(p.first, p.second): _entry(p, 1) for p in found} | {(p.second, p.first): _entry(p, -1) for p in found}
    rows = [[a, *(entries[a, b] if i < j else "" for j, b in enumerate(names))] for i, a in enumerate(names[:-1])]
    said = (
        f"{len(found)} pairs. The interval of {intervals} excludes zero (\\*); were all methods equal, "
        f"{(1 - LEVEL) * len(found):.0f} or more would. {beyond} differ by more than chance makes of the extremes of "
        f"{len(methods)} equal methods (\\*\\*)."
    )
    table = markdown(["row minus column", *names[1:]], [[first, *others] for first, _, *others in rows])
    return f"### {title[0].upper()}{title[1:]}\n\n{said}\n\n{table}"


def _entry(pair: Pair, sign: int) -> str:
    stars = "\\*\\*" if pair.beyond_chance else "\\*" if pair.difference.excludes_zero else ""
    return f"{sign * pair.difference.mean:+.2f}{stars}"


def _interval(mean: Mean, signed: bool = False) -> str:
    shown = "{:+.3f}" if signed else "{:.3f}"
    return f"{shown} [{shown}, {shown}]".format(mean.mean, mean.low, mean.high)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
