"""How a run ends that a signal, or the death of a rank, wants to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.rank_watch import RankWatch
from cppo_lightning.ranks import AllRanksError, AllRanksInterrupted, check_signals

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Shutdown(Callback):
    """Finishes the optimizer step in which Ctrl-C or SIGTERM comes, and ends ranks of which another has died.

    The command line gives it to every run, after the callbacks of the configuration.  Signals end a rollout or an evaluation
    at once, on all ranks; what was sampled of it is drawn again by a run that goes on, and of an evaluation also by one that
    has no rollout left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watch: RankWatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs on every rank before the model is loaded, when they have found each other."""
        if trainer.world_size > 1:
            self._watch = RankWatch()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout."""
        INTERRUPTS.deferred = True
        # Lightning's own handler of SIGTERM calls a collective, in the middle of whatever the ranks are at
        INTERRUPTS.handle()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs after each optimizer step, when the other callbacks are done with it."""
        check_signals(trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training."""
        check_signals(trainer.strategy.root_device)
        INTERRUPTS.deferred = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first problem of ``validate``, as the next two do for ``test`` and ``predict``."""
        INTERRUPTS.handle()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        INTERRUPTS.handle()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        INTERRUPTS.handle()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when the run ends by an exception, after the run has been saved."""
        INTERRUPTS.deferred = False
        if self._watch is not None:
            if isinstance(exception, AllRanksError | AllRanksInterrupted):
                self._watch.close()
            else:
                self._watch.failing(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs when the run has ended as it should."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
