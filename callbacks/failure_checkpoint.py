"""A checkpoint of a run that is interrupted, or whose rollouts fail, so that nothing is lost but the rollout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from cppo_lightning.errors import RolloutError
from cppo_lightning.interrupts import Interrupted
from cppo_lightning.ranks import AllRanksError, AllRanksInterrupted

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FailureCheckpoint(Callback):
    """Saves a run that a :class:`RolloutError` ends: an engine that is gone for good, or verifiers that do not start.

    So it does with one that Ctrl-C or SIGTERM ends.  Both come between optimizer steps, so that what is saved is whole; with
    several ranks, it is saved if all of them end so.  A second signal, or an error of torch, may come in the middle of a step
    or on one rank alone: then ``ModelCheckpoint``'s last file is where to go on from.  (Lightning's ``OnExceptionCheckpoint``
    saves then too, and fails where there is no model yet.)

    The command line gives one to every run that keeps checkpoints.

    Args:
        dirpath: folder of the checkpoint; null for ``checkpoints`` in the logger's folder.
        filename: its name; a file of this name is overwritten.
    """

    def __init__(self, dirpath: str | None = None, filename: str = "after_failure.ckpt") -> None:
        super().__init__()
        self.dirpath = dirpath
        self.filename = filename
        self._path: Path | None = None  # while there is training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded."""
        self._path = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout, on every rank, which the logger's folder takes."""
        folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._path = Path(folder) / self.filename

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when the run ends by an exception: saves, and notes at the exception where."""
        between_steps = RolloutError | Interrupted if trainer.world_size == 1 else AllRanksError | AllRanksInterrupted
        if self._path is None or not isinstance(exception, between_steps):
            return
        try:
            trainer.save_checkpoint(self._path)
        except (OSError, RuntimeError) as error:  # torch's for a disk that is full
            exception.add_note(f"the run could not be saved in {str(self._path)!r}: {error}")
        else:
            exception.add_note(f"the run is saved after {trainer.global_step} steps; go on with --ckpt_path {self._path}")
