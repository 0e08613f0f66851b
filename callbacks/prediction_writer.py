"""What ``predict`` leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BasePredictionWriter

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


# what ends a line for some readers, is no UTF-8 by itself, or drives a terminal, and json.dumps leaves as it is
_ESCAPED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class PredictionWriter(BasePredictionWriter):
    """Writes each judged response of ``predict`` as a line of JSON; :mod:`cppo_lightning.rollout.answers` lists the keys.

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
                file.write(_json_line(row))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the last prediction: says where they are."""
        if trainer.is_global_zero:
            print(f"predictions: {self._path}")


def _json_line(row: dict[str, Any]) -> str:
    """``row`` as JSON that is one line for every reader, other scripts than Latin left readable."""
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(row, ensure_ascii=False)) + "\n"
