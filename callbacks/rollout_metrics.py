"""What each rollout was worth: rewards, verdicts, lengths and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import rollout_data
from cppo_lightning.metrics import WeightedMeans, drain, log_metrics
from cppo_lightning.verifiers.base import Outcome

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import RolloutBatch
    from cppo_lightning.rollout.sampler import Rollout

NAMES = (
    "reward",
    "accuracy",
    "response_length",
    "truncated_share",
    "zero_spread_share",
    *(f"verdict/{outcome.value}" for outcome in Outcome),
    "tokens_per_second",
    "seconds_sampling",
    "seconds_verifying",
)


class RolloutMetrics(Callback):
    """Logs ``rollout/*`` once per rollout, over all ranks, at the optimizer steps its weights had seen.

    ``reward``: mean.  ``accuracy`` and ``verdict/*``: shares of the responses.  ``response_length``: mean tokens.
    ``truncated_share``: cut off by the length limit.  ``zero_spread_share``: groups whose rewards are all equal, which teach
    nothing.  ``tokens_per_second``: sampled, by all ranks together.  ``seconds_*``: mean over ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._means = WeightedMeans([f"rollout/{name}" for name in NAMES])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; before a rollout's first one it logs the rollout."""
        if batch_idx > 0:
            return
        rollout = rollout_data(trainer, type(self).__name__).rollout
        if rollout is not None:
            self._means.update({f"rollout/{k}": v for k, v in _totals(rollout, trainer.world_size).items()})
        metrics = drain(self._means, pl_module.device)
        log_metrics(trainer, metrics)


def _totals(rollout: Rollout, world_size: int) -> dict[str, tuple[float, float]]:
    samples, groups = rollout.samples, rollout.groups()
    outcomes = [sample.verdict.outcome for sample in samples]
    rewards = [[sample.verdict.reward for sample in group] for group in groups]
    totals: dict[str, tuple[float, float]] = {
        "reward": (sum(map(sum, rewards)), len(samples)),
        "accuracy": (outcomes.count(Outcome.CORRECT), len(samples)),
        "response_length": (rollout.num_tokens, len(samples)),
        "truncated_share": (sum(not sample.completion.finished for sample in samples), len(samples)),
        "zero_spread_share": (sum(max(group) == min(group) for group in rewards), len(groups)),
        # all ranks' tokens over the mean rank's seconds
        "tokens_per_second": (rollout.num_tokens, rollout.seconds_sampling / world_size),
        "seconds_sampling": (rollout.seconds_sampling, 1),
        "seconds_verifying": (rollout.seconds_verifying, 1),
    }
    return totals | {f"verdict/{outcome.value}": (outcomes.count(outcome), len(samples)) for outcome in Outcome}
