"""Optimizer steps that are not taken, because the loss or a gradient is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import log_metrics
from cppo_lightning.ranks import AllRanksError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import RolloutBatch
    from cppo_lightning.module import RLVRModule


class NonFiniteGuard(Callback):
    """Counts the steps that were not taken, keeps the minibatches they were meant for, and stops a run that takes no others.

    Logs ``train/nonfinite_steps``, their number so far.  Each minibatch has a folder ``0001``, ``0002``, ...: rank r writes its
    part of the tensors to ``rank<r>.safetensors``, under the names of :class:`~cppo_lightning.batch.RolloutBatch`, and to
    ``rank<r>.json`` the step, the problem of each row, its shares of surrogate and reference KL, the ranks whose shares are not
    finite, and the parameters whose gradient is not.

    Args:
        max_in_a_row: so many such steps without one between them stop the run; null goes on for ever.
        max_dumps: so many minibatches are kept, the first ones.
        dirpath: folder for them; null for ``nonfinite`` in the logger's folder.

    Raises:
        ConfigError: a number that is out of range.
    """

    def __init__(self, max_in_a_row: int | None = 5, max_dumps: int = 3, dirpath: str | None = None) -> None:
        super().__init__()
        if max_in_a_row is not None and max_in_a_row < 1:
            raise ConfigError(f"NonFiniteGuard.max_in_a_row must be at least 1, or null for no limit, got {max_in_a_row}")
        if max_dumps < 0:
            raise ConfigError(f"NonFiniteGuard.max_dumps must be at least 0, got {max_dumps}")
        self.max_in_a_row = max_in_a_row
        self.max_dumps = max_dumps
        self.dirpath = dirpath
        self.count = 0
        self.in_a_row = 0
        self._folder = Path()
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.in_a_row = int(state_dict["count"]), int(state_dict["in_a_row"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout, on every rank, which the logger's folder takes."""
        self._folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "nonfinite")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each optimizer step."""
        self._step = trainer.global_step

    def on_nonfinite_step(self, trainer: Trainer, pl_module: RLVRModule, batch: RolloutBatch, terms: Tensor) -> None:
        """Runs on every rank in place of an optimizer step, with the gradients that it would have been taken with."""
        self.count += 1
        self.in_a_row += 1
        if self.count <= self.max_dumps:
            _dump(self._folder / f"{self.count:04}", trainer, pl_module, batch, terms)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs after each optimizer step, or after none was taken.

        Raises:
            AllRanksError: on every rank, after ``max_in_a_row`` steps that were not taken.
        """
        if trainer.global_step > self._step:
            self.in_a_row = 0
        log_metrics(trainer, {"train/nonfinite_steps": self.count}, step=self._step)
        if self.max_in_a_row is not None and self.in_a_row >= self.max_in_a_row:
            kept = f"; {self._folder} has the minibatches" if self.max_dumps else ""
            stopped, self.in_a_row = self.in_a_row, 0  # the run may be saved now, and what goes on from there counts anew
            raise AllRanksError(
                f"at step {self._step} the loss or a gradient was not finite {stopped} times in a row, and no step was "
                f"taken{kept}; lower the learning rate, or look for what the model cannot compute in its dtype"
            )


def _dump(folder: Path, trainer: Trainer, module: RLVRModule, batch: RolloutBatch, terms: Tensor) -> None:
    rank, finite = trainer.global_rank, [_finite(terms)]
    if torch.distributed.is_initialized():
        finite = [True] * trainer.world_size
        torch.distributed.all_gather_object(finite, _finite(terms))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    save_file(tensors, folder / f"rank{rank}.safetensors")
    told = {
        "step": trainer.global_step,
        "rollout": trainer.current_epoch,
        "problems": _problems(trainer, batch),
        "surrogate": str(float(terms[0])),  # JSON has no NaN
        "reference_kl": str(float(terms[1])),
        "ranks": [i for i, is_finite in enumerate(finite) if not is_finite],
        "parameters": [name for name, p in module.named_parameters() if p.grad is not None and not _finite(p.grad)],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(told, indent=1))


def _problems(trainer: Trainer, batch: RolloutBatch) -> list[str | None]:
    """The problem's id for each row; None for one that the datamodule's rollout does not have."""
    rollout = getattr(getattr(trainer, "datamodule", None), "rollout", None)
    known = {} if rollout is None else {tuple(sample.prompt_ids): sample.problem.id for sample in rollout.samples}
    rows = zip(batch.prompt_ids.cpu(), batch.prompt_mask.cpu(), strict=True)
    return [known.get(tuple(ids[mask].tolist())) for ids, mask in rows]


def _finite(values: Tensor) -> bool:
    """Whether this rank's part of them is."""
    return bool((values.to_local() if isinstance(values, DTensor) else values).isfinite().all())
