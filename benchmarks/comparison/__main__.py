"""The commands: ``python -m benchmarks.comparison {run,collect,report}``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import arithmetic
from benchmarks.comparison.grid import REPOSITORY, STUDY, Run, load_study
from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.comparison.results import Result

RESULTS = Path(__file__).with_name("results.parquet")
PAGE = REPOSITORY / "docs" / "comparison.md"
FOLDER = REPOSITORY / "build" / "comparison"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return {"run": _run, "collect": _collect, "report": _report}[options.command](options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what has a result keeps it; the same command goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Of the three commands."""
    made = argparse.ArgumentParser("python -m benchmarks.comparison", description="Does the trust region matter?")
    commands = made.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="the runs of the grid, or some of them, that have no result yet")
    for name, kind in (("task", str), ("method", str), ("learning-rate", float), ("reuse", int), ("seed", int)):
        run.add_argument(f"--{name}", type=kind, nargs="+", help="only the runs with these")
    run.add_argument("--cores", type=int, nargs="+", help="one run on each; all that this process may use if left out")
    others = run.add_mutually_exclusive_group()
    others.add_argument("--against", type=Path, help="results that these have to be equal to")
    others.add_argument("--known", type=Path, help="results of an earlier sweep, whose runs are not run again")
    run.add_argument("options", nargs="*", help="further options of fit for all runs, after --")
    collect = commands.add_parser("collect", help="the results that there are by now, as one table for the report")
    for command in (run, collect):
        command.add_argument("--folder", type=Path, default=FOLDER, help="where runs leave what they leave")
    report = commands.add_parser("report", help="the tables and pictures of a study's page")
    for command in (collect, report):
        command.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument(
        "--page", type=Path, default=PAGE, help="Markdown, renewed between its markers; begun if it is not there"
    )
    for command in (run, collect, report):
        command.add_argument("--study", type=Path, default=STUDY, help="the YAML file that declares the grid")
    return made


def _run(options: argparse.Namespace) -> int:
    from benchmarks.comparison.sweep import Sweep

    study = load_study(options.study)
    runs = study.chosen(**{name: getattr(options, name) for name in Run._fields})
    against: Path | None = options.against
    known = _known(runs, against) if against else {}
    sweep = Sweep(study, options.folder, _cores(options.cores), options.options)
    if options.known:
        taken = sweep.take_over(options.known)
        print(f"{options.known}: {taken} results taken over, of declared runs of the same settings that have none here")
    failed = sweep.carry_out(runs)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs have no result; the same command tries them again", file=sys.stderr)
        return 1
    print(f"{sweep.results}: {len(runs)} runs")
    return _compare(sweep.results, known, against) if against else 0


def _cores(wanted: Sequence[int] | None = None) -> list[int]:
    there = sorted(os.sched_getaffinity(0))
    for core in wanted or ():
        if core not in there or list(wanted or ()).count(core) > 1:
            raise ConfigError(f"--cores {core}: this process may use {', '.join(map(str, there))}, each for one run at a time")
    return list(wanted or there)


def _known(runs: Sequence[Run], against: Path) -> dict[Run, Result]:
    """The results that these runs will have to be equal to.

    Raises:
        ConfigError: not all of them are there, which is said before anything runs.
    """
    from benchmarks.comparison.results import read

    known = {result.run: result for result in read(against)}
    if missing := [run for run in runs if run not in known]:
        raise ConfigError(
            f"--against {str(against)!r} has no result of {len(missing)} of these {len(runs)} runs, the first of them "
            f"{missing[0].name}: nothing to compare them with; choose runs that it has, or leave --against out"
        )
    return known


def _compare(file: Path, known: dict[Run, Result], against: Path) -> int:
    """Say of each run whether it is equal to the known one."""
    from benchmarks.comparison.results import difference, read

    unlike = 0
    for result in read(file):
        words = difference(result, known[result.run])
        unlike += words is not None
        print(f"{result.run.name}: {words or 'equal in every number'}")
    if unlike:
        print(
            f"{unlike} runs are not equal to those of {against}. Between kinds of processors, and versions of torch and its "
            "libraries, floats differ in their last bits and soon the samples do: compare the accuracies then"
        )
    return int(unlike > 0)


def _collect(options: argparse.Namespace) -> int:
    from benchmarks.comparison.sweep import Sweep

    study = load_study(options.study)
    runs = study.runs()
    there = Sweep(study, options.folder, _cores()).collect(runs, options.results)
    print(f"{options.results}: {there} of {len(runs)} runs")
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.comparison.report import write_report

    for file in write_report(load_study(options.study), options.results, options.page):
        print(file)
    return 0


if __name__ == "__main__":
    # libraries read them when they are loaded, which is from here on; not in main(), whose caller has a process of its own
    os.environ.update(arithmetic.settings())
    sys.exit(main())
