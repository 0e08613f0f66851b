"""Lightning's ModelCheckpoint, where optimizer steps are the module's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from cppo_lightning.replacing import left_standing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RunCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that also saves by ``every_n_train_steps`` and by ``train_time_interval``.

    Under manual optimization, which ``RLVRModule`` needs, Lightning 2.6 passes over the time and warns of the steps.  What is
    due at a rollout's last step is saved after the rollout's evaluations, so that a run that is resumed there does not lack
    them.  All arguments are ``ModelCheckpoint``'s.
    """

    _due = False  # since the rollout's last step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs after each update, on every rank: saves if it is time."""
        steps = self._every_n_train_steps
        if not (steps and trainer.global_step % steps == 0) and not self._time_is_up(trainer):
            return
        if trainer.is_last_batch:
            self._due = True
        else:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout, when other callbacks are done."""
        if self._due:
            self._due = False
            self._save(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What ``last`` is the latest of: also what lost its name to a checkpoint that a kill kept from taking it."""
        folder = Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        left = left_standing(folder, f"{self.CHECKPOINT_NAME_LAST}*{self.FILE_EXTENSION}")
        return super()._find_last_checkpoints(trainer) | left

    def _save(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)

    def _time_is_up(self, trainer: Trainer) -> bool:
        interval, since = self._train_time_interval, self._last_time_checked
        if interval is None or since is None:
            return False
        now = time.monotonic()
        # ranks' clocks differ, and all must save together
        is_up = bool(trainer.strategy.broadcast(now - since >= interval.total_seconds()))
        if is_up:
            self._last_time_checked = now
        return is_up
