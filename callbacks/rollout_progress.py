"""The run on one line: it moves in a terminal, and in a log file there is one per rollout and evaluation, and one a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar

from cppo_lightning.callbacks.progress_display import ProgressDisplay
from cppo_lightning.callbacks.progress_line import ProgressLine
from cppo_lightning.callbacks.reporting import accuracy_tags
from cppo_lightning.errors import ConfigError
from cppo_lightning.resume import updates_taken

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import RolloutBatch


class RolloutProgress(ProgressBar):
    """Rollout i of N, what is being done, reward, mask rate, sampled tokens per second, accuracy and time left.

    The numbers are the latest that ``RolloutMetrics``, ``MaskRate`` and ``EvalAccuracy`` logged; without those callbacks they
    are missing here too.

    Args:
        refresh_per_second: how often the line is drawn in a terminal.
        silent_seconds: after which a log file gets a line in the middle of a rollout or of an evaluation, at its next batch.

    Raises:
        ConfigError: an argument not above 0.
    """

    def __init__(self, refresh_per_second: float = 4.0, silent_seconds: float = 60.0) -> None:
        super().__init__()
        for name, value, usual in (("refresh_per_second", refresh_per_second, 4), ("silent_seconds", silent_seconds, 60)):
            if value <= 0:
                raise ConfigError(f"RolloutProgress.{name} must be above 0 (usual: {usual}), got {value}")
        self.refresh_per_second = refresh_per_second
        self.silent_seconds = silent_seconds
        self.is_enabled = True
        self._display: ProgressDisplay | None = None
        self._line = ProgressLine()
        self._started = self._unit_started = 0.0  # of the first and of the running rollout or batch
        self._seconds = 0.0  # that the running rollout took, without the evaluation after it
        self._first = 0  # rollouts done before this run, above 0 when it was resumed
        self._training_ended = False

    @property
    def is_disabled(self) -> bool:
        return not self.is_enabled

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        if self._display is None:
            print(*args, **kwargs)
        else:
            self._display.print(str(kwargs.get("sep", " ")).join(map(str, args)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded; other callbacks may evaluate before this one learns that training starts."""
        super().setup(trainer, pl_module, stage)
        self._training_ended = False
        self._line = ProgressLine(total=_total_rollouts(trainer) if stage == "fit" else None)
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout."""
        self._begin(ProgressLine(done=trainer.current_epoch, total=_total_rollouts(trainer), phase="starting"))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before each rollout is sampled."""
        self._unit_started = time.monotonic()
        if trainer.current_epoch == self._first:
            self._started = self._unit_started  # what came before tells nothing of the time that a rollout takes
        # again, as max_steps are further away after steps that were not taken
        self._set(trainer, total=_total_rollouts(trainer), phase="sampling", within=0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update, when the rollout has been sampled and judged."""
        total = trainer.num_training_batches
        self._set(trainer, phase=f"update {batch_idx + 1}/{total}", within=batch_idx / total)
        self._break_silence()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update."""
        self._seconds = time.monotonic() - self._unit_started
        self._set(trainer, within=(batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update."""
        self._unit_started = time.monotonic()
        self._set(trainer, done=trainer.current_epoch + 1, phase="", within=0.0)
        line = self._timed()
        finished = replace(line, done=line.done - 1, phase=f"step {trainer.global_step} | {self._seconds:.1f} s")
        self._write(finished.plain())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training."""
        self._training_ended = True
        self._set(trainer, phase="done", within=0.0)
        self._stop()

    def on_evaluation_progress(self, trainer: Trainer, dataset: str, done: int, total: int) -> None:
        """Runs before each batch of held-out problems (``EvalAccuracy`` calls it)."""
        self._start()
        self._set(trainer, phase=f"eval {dataset} {done}/{total}")
        self._break_silence()

    def on_evaluation_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Runs after each evaluation (``EvalAccuracy`` calls it)."""
        self._set(trainer, phase="")
        means = [f"{name} {metrics[name]:.3f}" for name in accuracy_tags(metrics)]
        self._write(" | ".join([f"evaluation at step {trainer.global_step}", *means]))
        if self._training_ended:
            self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before each pass over the validation batches, also inside fit."""
        if trainer.state.fn == "fit":
            self._set(trainer, phase="validating")
        else:
            self._begin(ProgressLine("batch", total=_total_batches(trainer.num_val_batches), phase="validating"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the test batches."""
        self._begin(ProgressLine("batch", total=_total_batches(trainer.num_test_batches), phase="testing"))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the prediction batches."""
        self._begin(ProgressLine("batch", total=_total_batches(trainer.num_predict_batches), phase="predicting"))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Runs after each validation batch."""
        if trainer.state.fn != "fit":
            self._end_batch(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Runs after each test batch."""
        self._end_batch(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Runs after each prediction batch."""
        self._end_batch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each pass over the validation batches, also inside fit."""
        if trainer.state.fn == "fit":
            self._set(trainer, phase="")
        else:
            self._end_pass()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the test batches."""
        self._end_pass()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the prediction batches."""
        self._end_pass()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when a run fails or is interrupted: gives the terminal back before the traceback."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs last of all."""
        self._stop()

    def _begin(self, line: ProgressLine) -> None:
        self._line = line
        self._first = line.done
        self._started = self._unit_started = time.monotonic()
        self._start()

    def _start(self) -> None:
        if self.is_enabled and self._display is None:
            self._display = ProgressDisplay(self._timed, self.refresh_per_second)

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _end_batch(self, trainer: Trainer) -> None:
        self._unit_started = time.monotonic()
        self._set(trainer, done=self._line.done + 1)
        if self._line.total is None or self._line.done < self._line.total:
            self._break_silence()

    def _end_pass(self) -> None:
        self._line = replace(self._line, phase=f"{self._line.phase}: done")
        self._write(self._timed().plain())
        self._stop()

    def _set(self, trainer: Trainer, **changes: Any) -> None:
        """A new line instead of a changed one: another thread may be drawing the old."""
        self._line = replace(self._line, numbers=_numbers(trainer.callback_metrics), **changes)

    def _write(self, text: str) -> None:
        """A line of the log, where there is no moving line that shows the same."""
        if self._display is not None and not self._display.moves:
            self._display.print(text)

    def _break_silence(self) -> None:
        if self._display is not None and self._display.silence >= self.silent_seconds:
            self._write(self._timed().plain())

    def _timed(self) -> ProgressLine:
        """The line with the time that has passed and that is left, if the finished units are like those to come."""
        line, now = self._line, time.monotonic()
        done = line.done - self._first
        elapsed = now - self._started
        if line.total is None or done == 0 or line.done >= line.total:
            return replace(line, elapsed=elapsed)
        average = (self._unit_started - self._started) / done
        left = average * (line.total - line.done) - min(average, now - self._unit_started)
        return replace(line, elapsed=elapsed, left=left)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Label and value by importance, from the latest logged metrics."""
    formats = {"rollout/reward": "reward {:.3f}", "mask/rate": "mask {:.1%}", "rollout/tokens_per_second": "{:.0f} tok/s"}
    shown = {name: text.format(float(metrics[name])) for name, text in formats.items() if name in metrics}
    means = [name for name in accuracy_tags(metrics) if name.startswith("eval/avg@")]
    return shown | {name: f"eval {float(metrics[name]):.3f}" for name in means}


def _total_rollouts(trainer: Trainer) -> int | None:
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs)
    if trainer.max_steps >= 0 and trainer.num_training_batches != math.inf:
        # counted from the running rollout's first update
        taken = updates_taken(trainer.fit_loop.epoch_loop.batch_progress) or 0
        remaining = taken + max(0, trainer.max_steps - trainer.global_step)
        limits.append(trainer.current_epoch + math.ceil(remaining / max(1, trainer.num_training_batches)))
    return min(limits, default=None)


def _total_batches(batches: int | float | Sequence[int | float]) -> int | None:
    total = sum(batches) if isinstance(batches, Sequence) else batches
    return None if total == math.inf else int(total)
