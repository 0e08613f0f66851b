"""What a run of the comparison leaves behind."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.callbacks import Callback

from benchmarks.comparison.results import ACCURACY, BINS, BUDGET_AT, EVALUATION, FINISHED, STEPS, TAGS, write_run
from cppo_lightning.callbacks.reporting import accuracy_tags, rollout_data
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.errors import RolloutError
from cppo_lightning.metrics import WeightedMeans, budget_totals, drain, mask_totals, masked_total, position_totals
from cppo_lightning.verifiers.base import Outcome

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
    from cppo_lightning.module import RLVRModule
    from cppo_lightning.rollout import Rollout

_LOGGED = ("train/entropy", "train/grad_norm")


class RunRecorder(Callback):
    """Writes ``results.TAGS`` of every rollout to one file, at the run's end and all at once.

    A run that ends by a :class:`RolloutError` has a result too, with the reason as its status; any other end leaves no file.
    It stands behind the callback that evaluates.

    Args:
        file: parquet, in a folder of this run's own.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = Path(file)
        self.rows: defaultdict[int, dict[str, float]] = defaultdict(dict)  # by rollout
        self.begun = 0  # rollouts
        self.told: dict[str, str] = {}
        self.means = WeightedMeans(TAGS)
        self.own_divergence = BinaryTV()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout: notes which weights it starts from."""
        digest = hashlib.blake2b(digest_size=8)
        for name, weight in cast("RLVRModule", pl_module).named_weights():
            digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
        self.told["initial_weights"] = digest.hexdigest()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each optimizer step; the first one of a rollout tells how many of its responses are right."""
        self._step = trainer.global_step
        if batch_idx > 0:
            return
        rollout = rollout_data(trainer, type(self).__name__).rollout
        assert rollout is not None, "one is trained on"
        right = [sample.verdict.outcome is Outcome.CORRECT for sample in rollout.samples]
        self.rows[self.begun] |= {ACCURACY: sum(right) / len(right), STEPS: 0}
        if self.begun == 0:
            self.told["first_rollout"] = _tokens_digest(rollout)
        self.begun += 1

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums."""
        mask = stats.mask
        totals = {**mask_totals(stats, gate, BINS), **budget_totals(stats, gate)}
        totals["divergence/binary_tv"] = masked_total(self.own_divergence(stats), mask)
        if "masked_by_budget" in gate.diagnostics:
            totals |= position_totals(BUDGET_AT, gate.diagnostics["masked_by_budget"], mask, BINS)
        self.means.update(totals)

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Runs after metrics were logged: an evaluation is of the weights that the next rollout is drawn with."""
        self.means.update({tag: (metrics[tag], 1.0) for tag in _LOGGED if tag in metrics})
        for tag in accuracy_tags(metrics):
            if tag.count("/") == 1:  # the mean over sets
                self.rows[self.begun][EVALUATION] = metrics[tag]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each optimizer step, or after none was taken."""
        self.rows[self.begun - 1][STEPS] += trainer.global_step - self._step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update."""
        self.rows[self.begun - 1] |= drain(self.means, pl_module.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training and its last evaluation, unless it failed."""
        write_run(self.file, {"status": FINISHED, **self.told}, self.rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when training fails, which is a result if the rollouts or the gradients were at fault."""
        if isinstance(exception, RolloutError):
            # where this machine keeps the run is none of its results
            reason = str(exception).replace(str(trainer.default_root_dir), ".")
            # a table has no place for a run without rows
            write_run(self.file, {"status": reason, **self.told}, self.rows or {0: {}})


def _tokens_digest(rollout: Rollout) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for sample in rollout.samples:
        digest.update(repr((list(sample.prompt_ids), sample.completion.ids.tolist())).encode())
    return digest.hexdigest()
