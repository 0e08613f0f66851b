"""Where the time of a training step goes, by Lightning's and torch's own hooks: nothing of the step is copied or replaced."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from measure import CPU, synchronize

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cppo_lightning.batch import RolloutBatch


class Clock(Callback):
    """Times steps, every second one of them phase by phase.

    Args:
        warm_up: steps that are not counted.
    """

    def __init__(self, warm_up: int) -> None:
        super().__init__()
        self.warm_up = warm_up
        self.whole: list[float] = []  # seconds of the steps without clocks
        self.phases: list[dict[str, float]] = []  # of the others
        self.micro_batches = 0  # of a step
        self._spent: dict[str, float] | None = None
        self._device, self._last = CPU, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        model = pl_module.policy.model.base_model
        model.register_forward_pre_hook(lambda *_: self._ends("the rest"))
        model.register_forward_hook(self._after_layers)
        pl_module.policy.register_forward_hook(lambda *_: self._ends("head and log-probs, forward"))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._ends("optimizer"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        counted = trainer.current_epoch - self.warm_up
        self._spent = defaultdict(float) if counted >= 0 and counted % 2 else None
        self._device, self.micro_batches = pl_module.device, 0
        synchronize(self._device)
        self._last = time.perf_counter()

    def _ends(self, phase: str) -> None:
        if self._spent is not None:
            synchronize(self._device)
            now = time.perf_counter()
            self._spent[phase] += now - self._last
            self._last = now

    def _after_layers(self, model: Any, inputs: Any, output: Any) -> None:
        self.micro_batches += 1
        self._ends("layers, forward")
        output.last_hidden_state.register_hook(lambda gradient: self._ends("loss, head and log-probs, backward"))

    def on_gate(self, trainer: Trainer, pl_module: Any, stats: Any, gate: Any) -> None:
        self._ends("trust region")

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        self._ends("layers, backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self._ends("gradient norm and clipping")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if self._spent is not None:
            self._ends("the rest")
            self.phases.append(dict(self._spent))
        elif trainer.current_epoch >= self.warm_up:
            synchronize(self._device)
            self.whole.append(time.perf_counter() - self._last)
