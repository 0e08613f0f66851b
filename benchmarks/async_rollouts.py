"""Seconds per rollout when sampling and training take turns, and when the next rollout is drawn while one is trained on.

    python benchmarks/async_rollouts.py

On one CPU both need the same cores: by default each may use half of them, in turn as well as at once.  "elsewhere" is an
engine that costs this machine next to nothing, as servers on other devices do: it answers at once and then sleeps.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from cppo_lightning.datamodule import RolloutDataModule
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import PolicyConfig
from cppo_lightning.rollout import Completion, PromptTemplate, ReasoningGymPrompts, RolloutPlan, Sampling, TransformersEngine
from cppo_lightning.small_models import tiny_model
from cppo_lightning.trust_regions import CPPO
from cppo_lightning.verifiers import Format

SUMS = {"operators": ["+"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
Interval = tuple[float, float]


class TimedEngine(TransformersEngine):
    """Notes when it samples, and sleeps for ``elsewhere`` seconds after each rollout."""

    def __init__(self, elsewhere: float = 0.0) -> None:
        super().__init__()
        self.elsewhere = elsewhere
        self.intervals: list[Interval] = []

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        started = time.perf_counter()
        completions = super().generate(*args, **kwargs)
        time.sleep(self.elsewhere)
        self.intervals.append((started, time.perf_counter()))
        return completions


class Stopwatch(Callback):
    """Notes when each rollout is wanted, and when it is trained on."""

    def __init__(self) -> None:
        self.rollouts: list[Interval] = []
        self.training: list[Interval] = []
        self._wanted = self._there = 0.0

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        self._wanted = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._there = time.perf_counter()

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.rollouts.append((self._wanted, now))
        self.training.append((self._there, now))


@dataclass
class Seconds:
    """One setting's rollouts, each in seconds."""

    rollout: list[float] = field(default_factory=list)  # wall
    sampling: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)  # of it, while the engine sampled

    def add(self, watch: Stopwatch, engine: TimedEngine) -> None:
        """Take in the rollouts of a run but the first, which is never drawn ahead, and the last, during which none is."""
        middle = slice(1, -1)
        self.rollout += [end - start for start, end in watch.rollouts[middle]]
        self.training += [end - start for start, end in watch.training[middle]]
        self.sampling += [end - start for start, end in engine.intervals[middle]]
        self.both += [
            sum(max(0.0, min(t[1], s[1]) - max(t[0], s[0])) for s in engine.intervals) for t in watch.training[middle]
        ]


@dataclass(frozen=True)
class Setting:
    name: str
    model: Path
    tokens: int
    samples: int
    threads: int
    rounds: int = 3  # runs of each kind, alternating
    elsewhere: float = 0.0

    def measure(self, ahead: int, rollouts: int, folder: str, seconds: Seconds) -> None:
        torch.set_num_threads(self.threads)
        seed_everything(0, verbose=False)
        engine, watch = TimedEngine(self.elsewhere), Stopwatch()
        module = RLVRModule(PolicyConfig(str(self.model)), CPPO(BinaryTV()))
        data = RolloutDataModule(
            str(self.model),
            ReasoningGymPrompts("basic_arithmetic", 200, params=SUMS),
            Format(r"[02468aeiou]\W*\Z"),  # right now and then, whatever the model knows
            engine,
            RolloutPlan(prompts=4, samples=self.samples, updates=2, max_staleness=ahead),
            Sampling(self.tokens),
            PromptTemplate(text="Tell me of {{ problem }}"),
        )
        quiet: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
        }
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=rollouts, callbacks=[watch], default_root_dir=folder, **quiet
        )
        try:
            trainer.fit(module, datamodule=data)
        finally:
            data.close()
        seconds.add(watch, engine)


def settings(options: argparse.Namespace, tiny: Path) -> list[Setting]:
    found = []
    for count in options.threads:
        found.append(Setting("tiny", tiny, 64, 16, count))
        found.append(Setting("tiny, elsewhere", tiny, 8, 64, count, elsewhere=0.4))
        if Path(options.model).is_dir():
            found.append(Setting("SmolLM2", Path(options.model), 24, 4, count, rounds=1))
    return found


def rows(name: str, threads: int, in_turn: Seconds, ahead: Seconds) -> list[list[str]]:
    """Both runs of one setting; the ideal hides all of whatever takes less time in turn."""
    turn, overlapped = (statistics.median(seconds.rollout) for seconds in (in_turn, ahead))
    hidden = min(statistics.median(in_turn.sampling), statistics.median(in_turn.training))
    ratio, share = f"{overlapped / turn:.2f}", f"{(turn - overlapped) / hidden:.0%}"

    def row(how: str, seconds: Seconds, *last: str) -> list[str]:
        columns = (seconds.rollout, seconds.sampling, seconds.training, seconds.both)
        return [name, str(threads), how, *(f"{statistics.median(column):.2f}" for column in columns), *last]

    return [row("in turn", in_turn, "1.00", ""), row("ahead", ahead, ratio, share)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rollouts in turn with training, and ahead of it.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="SmolLM2; left out where it is not there")
    parser.add_argument("--rollouts", type=int, default=5)
    half = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--threads", type=int, nargs="+", default=[half], help="of sampling and of training, each")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    table = Table(
        *("model", "threads", "", "rollout s", "sampling s", "training s", "both at once s", "in turn = 1"),
        "share of the ideal",
        title=f"Medians of the rollouts of 2 updates that {options.rollouts} in a row have between the first and the last",
    )
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        chosen = settings(options, tiny_model(Path(folder) / "tiny"))
        task = progress.add_task("runs", total=2 * sum(setting.rounds for setting in chosen))
        for setting in chosen:
            measured = Seconds(), Seconds()
            for _ in range(setting.rounds):
                for ahead in (0, 1):
                    setting.measure(ahead, options.rollouts, folder, measured[ahead])
                    progress.advance(task)
            for row in rows(setting.name, setting.threads, *measured):
                table.add_row(*row)
    console = Console(width=140)
    console.print(table)
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
