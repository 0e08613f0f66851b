"""The runs of a study, one process per core, until each has its result.

A run's result appears whole or not at all, so what a kill costs is the runs under way; started again, the sweep does those that
have none.  A run that fails by what it trains on is a result too.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.comparison.board import Board
from benchmarks.comparison.cost import Cost, Times, cost_of, times_of
from benchmarks.comparison.grid import REPOSITORY, Run, Study
from benchmarks.comparison.one_run import Place, carry_out
from benchmarks.comparison.results import FINISHED, Part, assemble, ending, taken_apart
from benchmarks.measure import setup
from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.worker import die_with_parent

_REFRESH = 1.0  # seconds
_DYING = 10.0  # seconds that the runs of a sweep which was just killed may take to end, and to let go of its folder


class Sweep:
    """Carries out runs of a study.

    Args:
        study: with the tasks and methods of the runs.
        folder: for results, models and logs, of one sweep at a time.
        cores: numbers of those to use, one run each.
        options: further ones of ``fit``, for all runs.
    """

    def __init__(self, study: Study, folder: Path, cores: Sequence[int], options: Sequence[str] = ()) -> None:
        self.study = study
        self.folder = folder.absolute()
        self.cores = cores
        self.options = list(options)
        files = {made.config for made in (*study.tasks.values(), *study.methods.values())}
        words = {word for task in study.tasks.values() for word in task.model}
        files |= {word for word in words if word.endswith((".yaml", ".yml")) and (REPOSITORY / word).is_file()}
        # what they say, whatever their comments
        self._configs: dict[str, Any] = {file: OmegaConf.to_container(OmegaConf.load(REPOSITORY / file)) for file in files}
        self._running: dict[int, tuple[ForkProcess, Run, int]] = {}  # by sentinel; the last is its core

    def place(self, run: Run) -> Place:
        """Where a run's files are: elsewhere for every other way to make it, so that no result is taken for another's."""
        task, method = self.study.tasks[run.task], self.study.methods[run.method]
        configs = [self._configs[file] for file in (task.config, method.config)]
        made_of = _digest(task.model, task.rollouts, method.overrides, configs, self.options)
        return Place(self.folder / "runs" / run.name / made_of)

    @property
    def results(self) -> Path:
        """All results as one table."""
        return self.folder / "results.parquet"

    def carry_out(self, runs: Sequence[Run]) -> list[Run]:
        """Get a result of each run, in the order given, and ``results`` once all are there.

        Returns:
            Runs that ended without a result, for which their logs have to be read.

        Raises:
            ConfigError: another sweep uses the folder, it cannot be written to, or a model cannot be made.
        """
        with _alone(self.folder), Board(self.study, len(runs), len(self.cores)) as board:
            left = [run for run in runs if not self.place(run).result.exists()]
            try:
                failed = self._carry_out(left, board)
            finally:
                for process, *_ in self._running.values():
                    process.terminate()
                for process, *_ in self._running.values():
                    process.join()
        if not failed:
            self.collect(runs, self.results)
        return failed

    def collect(self, runs: Sequence[Run], to: Path) -> int:
        """Write the results of those runs that have one, in the order given, and beside them, as .json, what they took.

        Returns:
            How many they are.

        Raises:
            ConfigError: none has a result, or ``to`` cannot be written.
        """
        there = [run for run in runs if self.place(run).result.exists()]
        if not there:
            raise ConfigError(f"--folder {str(self.folder)!r} has no result of these runs; make some with `run`")
        parts, cost = [Part.load(run, self.place(run).made_of, self.place(run).result) for run in there], self._cost(there)
        try:
            assemble(parts, to)
            cost.save(to)
        except OSError as error:
            raise ConfigError(f"{str(to)!r} cannot be written ({error}); what has a result keeps it") from error
        return len(there)

    def take_over(self, file: Path) -> int:
        """Take results that an earlier sweep has put together, for runs that have none here.

        Returns:
            How many.  Those that are made of something else now, or are no runs of this study, are left.

        Raises:
            ConfigError: the file, or the .json beside it, cannot be read.
        """
        declared, cost, taken = set(self.study.runs()), cost_of(file), 0
        with _alone(self.folder):
            for part in taken_apart(file):
                if part.run not in declared or (place := self.place(part.run)).made_of != part.made_of or place.result.exists():
                    continue
                if (core_seconds := cost.runs.get(part.run.name)) is not None:
                    Times(None, core_seconds, cost.machine).save(place.times)
                part.save(place.result)
                taken += 1
                noted = self._model_times(part.run.task)
                if part.run.task in cost.models and not noted.exists():
                    noted.parent.mkdir(parents=True, exist_ok=True)
                    Times(None, cost.models[part.run.task], cost.machine).save(noted)
        return taken

    def _carry_out(self, runs: Sequence[Run], board: Board) -> list[Run]:
        pending, free, failed = deque(runs), deque(self.cores), list[Run]()
        while pending or self._running:
            while pending and free:
                self._make_model(pending[0].task, board)
                self._start(pending.popleft(), free.popleft())
            board.show([*pending, *(run for _, run, _ in self._running.values())])
            for sentinel in wait(list(self._running), _REFRESH):
                process, run, core = self._running.pop(int(sentinel))  # type: ignore[call-overload]
                process.join()
                free.append(core)
                if not self._note(run, process.exitcode, board):
                    failed.append(run)
        board.show(failed)
        return failed

    def _start(self, run: Run, core: int) -> None:
        work = (self.study, run, self.model(run.task), self.place(run), core, os.getpid(), self.options)
        process = multiprocessing.get_context("fork").Process(target=carry_out, args=work)
        process.start()
        self._running[process.sentinel] = process, run, core

    def _note(self, run: Run, exitcode: int | None, board: Board) -> bool:
        """Tell of a run that has ended; False if it has no result."""
        place = self.place(run)
        if not place.result.exists():
            board.tell(f"{run.name} ended with {exitcode} and without a result: see {place.log}")
            return False
        status, accuracy = ending(place.result)
        if status != FINISHED:
            board.tell(f"{run.name} failed, which is its result: {status}")
        times = times_of(place.times)
        board.ended(run, times.seconds if times else None, accuracy)
        return True

    def model(self, task: str) -> Path:
        """The folder of a task's initial weights: elsewhere for every other way to make them."""
        words = self.study.tasks[task].model
        return self.folder / "models" / task / _digest(words, [self._configs[word] for word in words if word in self._configs])

    def _make_model(self, task: str, board: Board) -> None:
        model = self.model(task)
        if model.exists():  # it is renamed into place whole
            return
        words = [word.replace("{model}", str(model)) for word in self.study.tasks[task].model]
        board.tell(f"making the initial weights of {task}: python -m {' '.join(words)}")
        started, before = time.perf_counter(), _core_seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        if done.returncode or not model.exists():
            raise ConfigError(f"tasks.{task}.model: {' '.join(words)!r} has made no {str(model)!r}: {done.stderr[-2000:]}")
        Times(time.perf_counter() - started, _core_seconds_of_children() - before, setup()).save(self._model_times(task))

    def _model_times(self, task: str) -> Path:
        return self.model(task).with_suffix(".json")

    def _cost(self, runs: Sequence[Run]) -> Cost:
        """Of the runs and of their tasks' initial weights; what else the cores did meanwhile is not in it."""
        of_runs = {run.name: times_of(self.place(run).times) for run in runs}
        of_models = {task: times_of(self._model_times(task)) for task in dict.fromkeys(run.task for run in runs)}
        noted = [times for times in (*of_runs.values(), *of_models.values()) if times]
        return Cost(
            machine=" and ".join(dict.fromkeys(times.machine for times in noted)),
            cores=len(self.cores),
            models={task: times.core_seconds for task, times in of_models.items() if times},
            runs={name: times.core_seconds for name, times in of_runs.items() if times},
        )


def _digest(*of: Any) -> str:
    return hashlib.blake2b(repr(of).encode(), digest_size=4).hexdigest()


def _core_seconds_of_children() -> float:
    return sum(os.times()[2:4])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"--folder {str(folder)!r} cannot be written to ({error}); take another one") from error
    with opened as lock:
        until = time.monotonic() + _DYING
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise ConfigError(f"--folder {str(folder)!r} is in use by a sweep that is under way") from error
                time.sleep(0.1)
        yield
