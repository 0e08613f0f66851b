"""What ``validate`` and ``test`` leave behind: scores in a table and in TensorBoard, and every answer in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cppo_lightning.callbacks.reporting import answers_folder
from cppo_lightning.metrics import log_metrics
from cppo_lightning.rollout.answers import conclude
from cppo_lightning.rollout.evaluation import EvaluationBatch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.rollout.scores import Estimate, Row, Scores, SetScores


_WIDTH = 160  # columns in a log, where rich would cut the table to 80


class EvaluationReport(Callback):
    """Prints the scores of ``validate`` or ``test`` by set, and logs and keeps what :class:`EvalAccuracy` does in training.

    The command line gives it to both.  The tags stand at the optimizer steps that the weights have seen, also if they come from
    a checkpoint.  Answers are in ``evaluations/<set>/step=N.parquet`` in the logger's folder, scores in ``step=N.json`` there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: Scores | None = None  # of the last pass
        self._rows: list[Row] = []
        self._samples = self._step = 0
        self._folder = Path()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Runs after each batch of problems: takes its answers."""
        if isinstance(batch, EvaluationBatch):
            self._rows += batch.rows()
            self._samples, self._step = batch.rollout.n, batch.step

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs on every rank after the last batch: scores, logs and keeps the answers of all."""
        if not self._samples:
            return  # the batches are others than a RolloutDataModule's
        rows, self._rows = self._rows, []
        self._folder = answers_folder(trainer)
        self.scores = conclude(rows, self._samples, self._step, self._folder)
        log_metrics(trainer, self.scores.metrics(), step=self._step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs last, when the line of progress is gone: prints the table."""
        if trainer.is_global_zero and self.scores is not None:
            console = Console(emoji=False)
            if not console.is_terminal:
                console = Console(width=_WIDTH, emoji=False)
            console.print(score_table(self.scores, self._step), markup=False)
            # not in the table: a path is to be copied from one line
            console.print(f"answers: {self._folder}/*/step={self._step}.parquet", markup=False, highlight=False, soft_wrap=True)

    on_test_batch_end, on_test_epoch_end, on_test_end = on_validation_batch_end, on_validation_epoch_end, on_validation_end


def score_table(scores: Scores, step: int) -> Table:
    """A row per set, and one for their mean where there are several; avg@n with its 95 % interval."""
    title = f"Evaluation at step {step}, {scores.samples} samples per problem"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("set", overflow="fold")
    names = list(dict.fromkeys(key for found in scores.sets.values() for key in found.estimates))
    for header in ("problems", *names, "truncated", "unparseable"):
        table.add_column(header, justify="right", overflow="fold")  # in a narrow terminal no digit goes missing
    rows = {**scores.sets, **({"mean": scores.mean} if len(scores.sets) > 1 else {})}
    for name, found in rows.items():
        table.add_row(
            name, str(found.problems), *_cells(found, names), *map(_share, (found.truncated_share, found.unparseable_share))
        )
    return table


def _cells(found: SetScores, names: list[str]) -> list[str]:
    return [_estimate(name, found.estimates[name]) if name in found.estimates else "" for name in names]


def _estimate(name: str, estimate: Estimate) -> str:
    interval = f" [{_share(estimate.low)}, {_share(estimate.high)}]" if name.startswith("avg@") else ""
    return _share(estimate.value) + interval


def _share(value: float) -> str:
    return f"{value:.3f}"
