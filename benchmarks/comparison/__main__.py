"""The commands: ``python -m benchmarks.comparison {run,report}``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.comparison import arithmetic
from benchmarks.comparison.grid import REPOSITORY, STUDY, Run, load_study
from cppo_lightning.errors import ConfigError

RESULTS = Path(__file__).with_name("results.parquet")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.comparison", description="Does the trust region matter?")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="the runs of the grid, or some of them, that have no result yet")
    run.add_argument("--study", type=Path, default=STUDY, help="the YAML file that declares the grid")
    run.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "comparison")
    for name, kind in (("task", str), ("method", str), ("learning-rate", float), ("reuse", int), ("seed", int)):
        run.add_argument(f"--{name}", type=kind, nargs="+", help="only the runs with these")
    run.add_argument("--cores", type=int, nargs="+", help="one run on each; all that this process may use if left out")
    run.add_argument("--against", type=Path, help="results that these have to be equal to")
    run.add_argument("options", nargs="*", help="further options of fit for all runs, after --")
    report = commands.add_parser("report", help="the tables and pictures of docs/comparison.md")
    report.add_argument("--study", type=Path, default=STUDY)
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="the folder of comparison.md")
    options = parser.parse_args(arguments)
    try:
        return _run(options) if options.command == "run" else _report(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what has a result keeps it; the same command goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    os.environ.update(arithmetic.settings())
    # torch reads them when it is imported, which is from here on
    from benchmarks.comparison.sweep import Sweep
    from benchmarks.measure import machine

    study = load_study(options.study)
    wanted = {name: getattr(options, name) for name in Run._fields}
    runs = study.chosen(**wanted)
    cores = options.cores or sorted(os.sched_getaffinity(0))
    sweep = Sweep(study, options.folder, cores, options.options)
    failed = sweep.carry_out(runs)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs have no result; the same command tries them again", file=sys.stderr)
        return 1
    cost = {"machine": machine(), "cores": len(cores), "runs": len(runs), **sweep.cost(runs)}
    sweep.results.with_suffix(".json").write_text(json.dumps(cost, indent=1) + "\n")
    print(f"{sweep.results}: {len(runs)} runs, {cost['core_seconds'] / 3600:.2f} core hours")
    return 0 if options.against is None else _compare(sweep.results, options.against)


def _compare(ours: Path, theirs: Path) -> int:
    """Say of each run whether it is equal to the other one."""
    from benchmarks.comparison.results import difference, read

    known = {result.run: result for result in read(theirs)}
    unlike = 0
    for result in read(ours):
        other = known.get(result.run)
        words = "not there" if other is None else difference(result, other)
        unlike += words is not None
        print(f"{result.run.name}: {words or 'equal in every number'}")
    if unlike:
        print(
            f"{unlike} runs are not equal to those of {theirs}. Between kinds of processors, and versions of torch and its "
            "libraries, floats differ in their last bits and soon the samples do: compare the accuracies then"
        )
    return int(unlike > 0)


def _report(options: argparse.Namespace) -> int:
    from benchmarks.comparison.report import write_report

    for file in write_report(load_study(options.study), options.results, options.docs):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
