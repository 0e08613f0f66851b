"""A study's page, such as docs/comparison.md: the tables between its markers, and the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison.cost import Cost, cost_of
from benchmarks.comparison.grid import Study
from benchmarks.comparison.outcomes import Cells, by_cell, outcome, unpaired
from benchmarks.comparison.results import Result, read
from benchmarks.comparison.tables import tables
from cppo_lightning.errors import ConfigError
from cppo_lightning.untrusted import whole_file

_SECTIONS = {  # of a page that is begun
    "cost": "How much has run",
    "overview": "Every run",
    "stable": "Which learning rates are stable",
    "cells": "Accuracy",
    "pairs": "Every pair of methods",
    "pictures": "Pictures",
}
_MARKED = "<!-- made by python -m benchmarks.comparison report: {} -->"


def write_report(study: Study, results_file: Path, page: Path) -> list[Path]:
    """Renew the page's tables and pictures, or begin a page; returns the files written.

    Raises:
        ConfigError: results that cannot be read, that are of a run which the study does not declare, or whose runs are not
            paired; or a page without markers, or in no folder.
    """
    from benchmarks.comparison.overview import draw_overview
    from benchmarks.comparison.pictures import pictures
    from cppo_lightning.figures.style import to_png

    if not page.parent.is_dir():
        raise ConfigError(f"--page {str(page)!r}: {str(page.parent)!r} is no folder; make it, or take another one")
    text = page.read_text() if page.exists() else new_page()
    for name in _SECTIONS:  # before pictures of other results are beside it
        replaced(text, name, "")
    results = read(results_file)
    parts = of_results(study, results, cost_of(results_file))
    cells = _cells(study, results)
    overview = page.with_suffix(".png")
    to_png(draw_overview(study, cells), overview)
    parts["overview"] = f"![Final accuracy of every run, by cell and method]({overview.name})"
    drawn = pictures(study, results, cells, page)
    parts["pictures"] = "\n\n".join(f"![{words}]({file.name})" for file, words in drawn.items())
    for name, part in parts.items():
        text = replaced(text, name, part)
    with whole_file(page) as file:
        file.write(text.encode())
    return [page, overview, *drawn]


def of_results(study: Study, results: Sequence[Result], cost: Cost) -> dict[str, str]:
    """The page's tables by the name of their place.

    Raises:
        ConfigError: results of a run which the study does not declare, or runs that are not paired.
    """
    declared = set(study.runs())
    if strange := [result.run.name for result in results if result.run not in declared]:
        raise ConfigError(f"--results has {len(strange)} runs that --study does not declare, the first of them {strange[0]}")
    if wrong := unpaired(results):
        raise ConfigError(f"{wrong[0]} and {len(wrong) - 1} more began with other weights or samples than others of their seed")
    return tables(study, _cells(study, results), cost)


def _cells(study: Study, results: Sequence[Result]) -> Cells:
    found = by_cell([outcome(result, study.definitions) for result in results])
    return {cell: found[cell] for cell in study.cells if cell in found}


def new_page() -> str:
    """With a section and a place for each part."""
    places = [f"## {title}\n\n{_MARKED.format(name)}\n\n{_MARKED.format(f'{name}, end')}" for name, title in _SECTIONS.items()]
    return "\n\n".join(["# A comparison of trust regions", *places]) + "\n"


def replaced(page: str, name: str, part: str) -> str:
    """The page with ``part`` between the two markers called ``name``.

    Raises:
        ConfigError: the page does not have them.
    """
    begin, end = (_MARKED.format(f"{name}{edge}") for edge in ("", ", end"))
    if begin not in page or end not in page:
        raise ConfigError(f"the page has no place for {name}: it needs the lines {begin!r} and {end!r}")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{part}\n\n{end}", page, flags=re.DOTALL)
