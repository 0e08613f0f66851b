"""``python -m cppo_lightning resume-check``: kills a run and resumes it, and compares it with one that was left alone.

Both runs are ``fit`` with the same settings, but for the logger, which is TensorBoard in a folder of this command, and the
folder of checkpoints; a run without checkpoints gets one after each optimizer step.  Compared are, at the end, every weight's
checksum; the last value of every metric at every step, times left out; and for every update its problems and responses.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.resume_traces import LOGS, Comparison, Record, compare, seconds_of_updates, updates

_FIT = (sys.executable, "-m", "cppo_lightning", "fit")
_POLL = 0.005  # seconds
_KEEPERS = ("ModelCheckpoint", "RunCheckpoint")


class Runs:
    """Runs of one configuration, each in a folder of its own.

    Args:
        config: what ``fit --print_config`` gives.
        folder: holds the folders.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Begin the run ``name``, or go on with it from its last checkpoint; its output goes to ``output.txt``."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        (place / "config.yaml").write_text(yaml.safe_dump(_moved(self.config, place)))
        with (place / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*_FIT, "--config", str(place / "config.yaml"), "--ckpt_path", "last"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ranks and workers are killed with it
            )

    def finish(self, name: str) -> None:
        """Run ``name`` to its end.

        Raises:
            RolloutError: it failed.
        """
        process = self.start(name)
        try:
            if process.wait():
                raise self._failed(name, process.returncode)
        finally:
            _kill(process)

    def kill(self, name: str, update: tuple[int, int], seconds: float) -> bool:
        """Run ``name`` until ``seconds`` after an update began and kill it; False if it was over before.

        Args:
            name: the run.
            update: its numbers of rollout and update; one that has a checkpoint does not begin again, but a later one does.
            seconds: after its beginning.

        Raises:
            RolloutError: the run failed.
        """
        known = len(updates(self.folder / name))
        process = self.start(name)
        try:
            while not any(begun >= update for begun in updates(self.folder / name)[known:]) and process.poll() is None:
                time.sleep(_POLL)
            end = time.monotonic() + seconds
            while time.monotonic() < end and process.poll() is None:
                time.sleep(_POLL)
            if process.poll():
                raise self._failed(name, process.returncode)
            return process.poll() is None
        finally:
            _kill(process)

    def _failed(self, name: str, code: int) -> RolloutError:
        output = (self.folder / name / "output.txt").read_text(errors="replace").strip()
        return RolloutError(f"the run {name!r} failed with exit code {code}: {output[-2000:]}")


def main(args: Sequence[str] | None = None) -> None:
    """The command: exit code 0 if nothing differs, 1 if anything does."""
    parser = argparse.ArgumentParser(
        "python -m cppo_lightning resume-check",
        description=__doc__,
        epilog="All other options are those of fit.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=3, help="how often the run is killed (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is (default: 0)")
    parser.add_argument("--folder", type=Path, help="an empty folder for the runs, kept; without it, a temporary one")
    given, settings = parser.parse_known_args(args)
    if given.kills < 1:
        raise ConfigError(f"--kills must be at least 1, got {given.kills}")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--folder {str(folder)!r} is not empty")
        found = check(Runs(_parsed(settings), folder.absolute()), given.kills, given.seed)
    sys.exit(any(comparison.first for comparison in found))


def check(runs: Runs, kills: int, seed: int) -> list[Comparison]:
    """Run once undisturbed and once with kills, and print how they compare.

    A moment is in an update, any but the last, or in the rollout that is drawn after it.

    Raises:
        ConfigError: there is one update alone.
        RolloutError: a run failed, or was over before its last kill.
    """
    console = Console()
    runs.finish("left_alone")
    places, taken = updates(runs.folder / "left_alone"), seconds_of_updates(runs.folder / "left_alone")
    console.print(f"left alone, it takes {len(places)} updates in {sum(taken):.1f} s after the first rollout is drawn")
    if len(places) < 2:
        raise ConfigError("resume-check needs a run of at least two updates: raise trainer.max_epochs")
    generator = random.Random(seed)
    for number, moment in enumerate(sorted(generator.uniform(0, len(places) - 1) for _ in range(kills)), 1):
        place, seconds = places[int(moment)], moment % 1 * taken[int(moment)]
        where = f"{seconds:.2f} s after the beginning of update {place[1] + 1} of rollout {place[0] + 1}"
        if not runs.kill("killed", place, seconds):
            raise RolloutError(f"the run was over before kill {number} of {kills}, {where}; try longer rollouts")
        console.print(f"kill {number} of {kills}, {where}")
    runs.finish("killed")
    found = compare(runs.folder / "left_alone", runs.folder / "killed")
    table = Table(title=f"After {kills} kills, against the run left alone", title_justify="left")
    for name in ("", "equal", "first difference"):
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(row.what, f"{row.equal} of {row.total}", row.first or "none")
    console.print(table, markup=False)
    return found


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    """All settings of a run.  Ends this process as ``fit`` would if they are wrong."""
    done = subprocess.run([*_FIT, *settings, "--print_config"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return yaml.safe_load(done.stdout)


def _moved(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The settings of a run that logs and saves to ``place``."""
    logger = {"save_dir": str(place), "name": "", "version": LOGS}
    callbacks = []
    for callback in config["trainer"]["callbacks"] or []:
        if callback["class_path"].rpartition(".")[2] in _KEEPERS:
            saves = {"dirpath": str(place / "checkpoints"), "save_last": True, "enable_version_counter": False}
            callback = {**callback, "init_args": {**callback.get("init_args", {}), **saves}}
        callbacks.append(callback)
    if not any(callback["class_path"].rpartition(".")[2] in _KEEPERS for callback in callbacks):
        saves = {"dirpath": str(place / "checkpoints"), "save_last": True, "save_top_k": 0, "every_n_train_steps": 1}
        callbacks.append({"class_path": "cppo_lightning.callbacks.RunCheckpoint", "init_args": saves})
    callbacks.append({"class_path": f"{Record.__module__}.Record", "init_args": {"folder": str(place)}})
    changed = {
        "enable_checkpointing": True,
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        "callbacks": callbacks,
    }
    return {**config, "trainer": {**config["trainer"], **changed}}


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
