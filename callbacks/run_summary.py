"""What a run came to, in a table at its end."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from cppo_lightning.callbacks.eval_accuracy import EvalAccuracy
from cppo_lightning.metrics import WeightedMeans, drain, masked_total

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats

MASK = "mask/rate"


class RunSummary(Callback):
    """Prints, on rank zero: accuracy before and after, seconds per rollout, mask rate, where the logs are, what to try next.

    Times and mask rates are of this process: those of a resumed run are from where it was resumed, and a rollout that it was
    resumed inside of has no times.  Rollouts and steps are those of the whole run.  "Verifying" is the time spent waiting for
    verdicts after the last response, as most responses are judged while others are still being sampled.

    Args:
        next_commands: shell commands to suggest.
    """

    def __init__(self, next_commands: list[str] | None = None) -> None:
        super().__init__()
        self.next_commands = list(next_commands or ())
        self._rollout_mask, self._run_mask = WeightedMeans([MASK]), WeightedMeans([MASK])
        self._mask_rates: list[float] = []  # one per rollout in which a step was taken
        self._seconds: list[tuple[float, float, float]] = []  # sampling, verifying, updating, one per rollout seen whole
        self._rollout_started: float | None = None
        self._updates_started = self._updates_ended = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before each rollout is sampled."""
        self._rollout_started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; the first one tells that the rollout has been judged."""
        if batch_idx == 0:
            self._updates_started = time.perf_counter()

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums without waiting for the accelerator."""
        total = {MASK: masked_total(~gate.keep, stats.mask)}
        self._rollout_mask.update(total)
        self._run_mask.update(total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update; the last one ends the rollout, before any evaluation."""
        self._updates_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update, on every rank."""
        self._mask_rates.extend(drain(self._rollout_mask, pl_module.device).values())
        if self._rollout_started is None:
            return  # resumed inside of this rollout, where Lightning tells of no start
        rollout = getattr(getattr(trainer, "datamodule", None), "rollout", None)
        waited = self._updates_started - self._rollout_started
        # of a rollout that was drawn ahead, most was over before it was wanted
        verifying = 0.0 if rollout is None else min(waited, rollout.seconds_verifying)
        self._seconds.append((waited - verifying, verifying, self._updates_ended - self._updates_started))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training and its last evaluation."""
        mean_mask = drain(self._run_mask, pl_module.device).get(MASK)
        if not trainer.is_global_zero:
            return
        table = Table(title="Summary of the run", show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in [*_accuracies(trainer), *self._rows(trainer, mean_mask)]:
            table.add_row(name, text)
        console = Console(emoji=False)
        console.print(table, markup=False)
        for title, commands in (("Look at it", _tensorboard_commands(trainer)), ("Try next", self.next_commands)):
            if commands:
                lines = "\n".join(f"  {command}" for command in commands)
                # not in the table: a command is to be copied from one line
                console.print(f"{title}:\n{lines}", markup=False, highlight=False, soft_wrap=True)

    def _rows(self, trainer: Trainer, mean_mask: float | None) -> list[tuple[str, str]]:
        rows = [("rollouts, optimizer steps", f"{trainer.current_epoch}, {trainer.global_step}")]
        if self._seconds:
            whole = statistics.median(map(sum, self._seconds))
            parts = [statistics.median(column) for column in zip(*self._seconds, strict=True)]
            split = "sampling {:.1f}, verifying {:.1f}, updating {:.1f}".format(*parts)
            rows.append(("seconds per rollout (medians)", f"{whole:.1f} ({split})"))
        if mean_mask is not None:
            first, last = self._mask_rates[0], self._mask_rates[-1]
            rows.append(("mask rate", f"{mean_mask:.2%} of tokens (first rollout {first:.2%}, last {last:.2%})"))
        return rows


def _accuracies(trainer: Trainer) -> list[tuple[str, str]]:
    """First and last evaluation of each set."""
    rows = []
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, EvalAccuracy) and callback.history:
            (first_step, before), (last_step, after) = callback.history[0], callback.history[-1]
            for tag in callback.curve_tags().values():
                change = f"{after[tag]:.3f} at step {last_step}"
                if first_step != last_step and tag in before:
                    change = f"{before[tag]:.3f} at step {first_step}  ->  {change}"
                rows.append((f"accuracy, {tag.removeprefix('eval/')}", change))
    return rows


def _tensorboard_commands(trainer: Trainer) -> Sequence[str]:
    beside = Path(sys.executable).with_name("tensorboard")  # the one of this environment, which need not be on the path
    program = _short(beside) if beside.exists() else "tensorboard"
    folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [f"{shlex.quote(program)} --logdir {shlex.quote(_short(Path(folder)))}" for folder in folders]


def _short(path: Path) -> str:
    """The path as seen from the working folder, where it lies inside."""
    relative = os.path.relpath(path.absolute())
    return str(path.absolute()) if relative.startswith("..") else relative
