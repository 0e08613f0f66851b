"""What ``predict`` leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BasePredictionWriter

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PredictionWriter(BasePredictionWriter):
    """Writes each judged response of ``predict`` as one line of JSON.

    Args:
        folder: where ``predictions.jsonl`` goes (``predictions.RANK.jsonl`` on several ranks); None is the logger's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._path = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first prediction: starts an empty file."""
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = folder / f"predictions{rank}.jsonl"
        self._path.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Runs after each batch of problems: appends its responses."""
        with self._path.open("a", encoding="utf-8") as file:
            for row in prediction:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the last prediction: says where they are."""
        if trainer.is_global_zero:
            print(f"predictions: {self._path}")
