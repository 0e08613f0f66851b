"""Rollouts on disk, with what the trust region saw and decided, for ``python -m cppo_lightning replay``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import rollout_data
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.mismatch import RecomputedBatch
from cppo_lightning.ranks import data_share, leads_batch
from cppo_lightning.replay.regions import settings_of
from cppo_lightning.replay.run_card import FOLDER, FORMAT, RunCard, part_path, parts_of
from cppo_lightning.resume import updates_taken, versions

if TYPE_CHECKING:
    import pyarrow as pa
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats


class RolloutRecorder(Callback):
    """Writes every n-th rollout to disk, response by response, as the trust region saw it at each update.

    ``recording/run.json`` in the logger's folder says what the run was made with, and ``recording/rollouts/rank<r>/`` has a
    parquet file for each update, which docs/replay.md describes: ids, mu, pi at that update, top-K of both, rewards, advantages
    and what the trust region decided.  A file has its name when it is whole, and a run that is resumed goes on in its folder.

    A token takes 16 + 12 K bytes before compression (K the trust region's top-K, 20 for CPPO's): an update of 256 responses of
    4,000 tokens is 260 MB in memory, until it is over, and some two thirds of that on disk.  Every micro-batch is copied
    to the CPU, which the accelerator waits for.

    Args:
        every_n_rollouts: rollouts from one that is recorded to the next, the first included.
        keep: recorded rollouts that are kept, the latest; null keeps all.
        dirpath: folder for the recording; null for ``recording`` in the logger's folder.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, every_n_rollouts: int = 10, keep: int | None = 4, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_rollouts < 1:
            raise ConfigError(f"RolloutRecorder.every_n_rollouts must be at least 1, got {every_n_rollouts}")
        if keep is not None and keep < 1:
            raise ConfigError(f"RolloutRecorder.keep must be at least 1, or null for all, got {keep}")
        self.every_n_rollouts = every_n_rollouts
        self.keep = keep
        self.dirpath = dirpath
        self._folder = Path()
        self._writes = True
        self._update = 0
        self._batch: RolloutBatch | None = None
        self._seen: list[pa.Table] = []  # micro-batches of the update under way

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Runs once before the first rollout, on every rank, which the logger's folder takes; rank 0 prepares the folder."""
        self._folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / FOLDER)
        self._writes = leads_batch(trainer)
        if not trainer.is_global_zero:
            return
        begins = (trainer.current_epoch, updates_taken(trainer.fit_loop.epoch_loop.batch_progress) or 0)
        for place, paths in parts_of(self._folder).items():
            if place >= begins:  # of a run that had gone on from here, perhaps on more ranks; the others are still waiting
                for path in paths:
                    path.unlink()
        self._card(trainer, pl_module).write(self._folder)

    def _card(self, trainer: Trainer, module: Any) -> RunCard:
        data: Any = rollout_data(trainer, type(self).__name__)
        return RunCard(
            format=FORMAT,
            versions=versions(),
            model=data.model,
            trust_region=settings_of(module.trust_region),
            anchor=module.anchor,
            mismatch=settings_of(module.mismatch),
            top_k=data.top_k,
            sampling=asdict(data.sampling),
            seed=data.seed,
            plan=asdict(data.plan),
            ranks=data_share(trainer)[1],
            micro_batch_tokens=module.micro_batch_tokens,
            every_n_rollouts=self.every_n_rollouts,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update."""
        self._update, self._batch, self._seen = batch_idx, batch, []

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate, and copies it.

        Raises:
            RolloutError: the module does not say which samples the rows are.
        """
        if not self._writes or trainer.current_epoch % self.every_n_rollouts:
            return
        from cppo_lightning.replay.layout import Place
        from cppo_lightning.replay.writing import to_table

        rollout = rollout_data(trainer, type(self).__name__).rollout
        if stats.sample is None or rollout is None:
            raise RolloutError("RolloutRecorder needs TokenStats.sample and the datamodule's rollout, and one is None")
        place = Place(trainer.current_epoch, self._update, trainer.global_step, data_share(trainer)[0], len(self._seen))
        table = to_table(place, stats, gate, _old_logp(self._batch, stats), stats.sample, rollout)
        if len(table):  # else it is there for the other ranks' collectives alone
            self._seen.append(table)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update, also one whose step was not taken: writes what this rank saw of it."""
        if not self._seen:
            return
        from cppo_lightning.replay.writing import write

        rank, _ = data_share(trainer)
        write(self._seen, part_path(self._folder, rank, trainer.current_epoch, batch_idx))
        self._seen = []
        if self.keep is not None:
            self._discard_old(rank, self.keep)

    def _discard_old(self, rank: int, keep: int) -> None:
        mine = part_path(self._folder, rank, 0, 0).parent
        files = [(rollout, path) for (rollout, _), paths in parts_of(self._folder).items() for path in paths]
        found = [(rollout, path) for rollout, path in files if path.parent == mine]
        latest = sorted({rollout for rollout, _ in found})[-keep:]
        for rollout, path in found:
            if rollout not in latest:
                path.unlink()


def _old_logp(batch: RolloutBatch | None, stats: TokenStats) -> Tensor | None:
    """log pi_old ``[B, T]`` of a micro-batch, which the update's whole batch has: rows are known by their sample."""
    if not isinstance(batch, RecomputedBatch) or batch.old_logp is None or batch.sample is None or stats.sample is None:
        return None
    rows = (batch.sample == stats.sample[:, None]).int().argmax(-1)
    return batch.old_logp[rows, : stats.mask.shape[1]]
