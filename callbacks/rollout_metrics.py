"""What each rollout was worth: rewards, verdicts, lengths and speed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import over_ranks, rollout_data
from cppo_lightning.metrics import WeightedMeans, drain, log_metrics
from cppo_lightning.ranks import data_share
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
    """Logs ``rollout/*`` once per rollout, over all ranks, at the number of optimizer steps taken before it is trained on.

    ``reward``: mean.  ``accuracy`` and ``verdict/*``: shares of the responses.  ``response_length``: mean tokens.
    ``truncated_share``: cut off by the length limit.  ``zero_spread_share``: groups whose rewards are all equal, which teach
    nothing.  ``tokens_per_second``: sampled, by all ranks together.  ``seconds_sampling``: until the last response had ended;
    ``seconds_verifying``: from then until the last verdict, as most are judged before; means over ranks.

    ``reward/<part>``: mean of one part of the reward, where the verifier gives several (``Verdict.parts``), before weighting.
    ``accuracy/<set>``: of one data set's responses, where problems say which theirs is (``Problem.dataset``).

    ``staleness`` and ``staleness_max``: mean and largest age of what the rollout's optimizer steps were taken on, in steps
    since the weights that sampled it; logged after the last update, nothing if no step was taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step, self._ages = 0, list[int]()  # of the update under way; of each step taken on the rollout

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of a rollout: the ages of the steps that were taken on it."""
        return {"ages": list(self._ages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ages = list(state_dict["ages"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; before a rollout's first one it logs the rollout."""
        self._step = trainer.global_step
        if batch_idx > 0:
            return
        self._ages.clear()
        rollout = rollout_data(trainer, type(self).__name__).rollout
        totals = {} if rollout is None else _totals(rollout, data_share(trainer)[1]) | _by_name(rollout)
        # which parts and sets there are shows only in the samples, and ranks may have seen different ones
        others = over_ranks(name for name in totals if name not in NAMES)
        means = WeightedMeans([f"rollout/{name}" for name in (*NAMES, *others)])
        means.update({f"rollout/{name}": pair for name, pair in totals.items()})
        log_metrics(trainer, drain(means, pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update; after a rollout's last one it logs the ages, which are the same on every rank."""
        rollout = rollout_data(trainer, type(self).__name__).rollout
        if rollout is not None and trainer.global_step > self._step:
            self._ages.append(self._step - rollout.version)
        if trainer.is_last_batch and self._ages:
            ages = {"rollout/staleness": sum(self._ages) / len(self._ages), "rollout/staleness_max": float(max(self._ages))}
            log_metrics(trainer, ages, step=trainer.global_step - 1)


def _totals(rollout: Rollout, rollouts: int) -> dict[str, tuple[float, float]]:
    samples, groups = rollout.samples, rollout.groups()
    outcomes = [sample.verdict.outcome for sample in samples]
    rewards = [[sample.verdict.reward for sample in group] for group in groups]
    totals: dict[str, tuple[float, float]] = {
        "reward": (sum(map(sum, rewards)), len(samples)),
        "accuracy": (outcomes.count(Outcome.CORRECT), len(samples)),
        "response_length": (rollout.num_tokens, len(samples)),
        "truncated_share": (sum(not sample.completion.finished for sample in samples), len(samples)),
        "zero_spread_share": (sum(max(group) == min(group) for group in rewards), len(groups)),
        # the tokens of all rollouts over the mean rank's seconds
        "tokens_per_second": (rollout.num_tokens, rollout.seconds_sampling / rollouts),
        "seconds_sampling": (rollout.seconds_sampling, 1),
        "seconds_verifying": (rollout.seconds_verifying, 1),
    }
    return totals | {f"verdict/{outcome.value}": (outcomes.count(outcome), len(samples)) for outcome in Outcome}


def _by_name(rollout: Rollout) -> dict[str, tuple[float, float]]:
    """Sum and count of each part of the reward and of the right answers in each data set."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for sample in rollout.samples:
        for part, reward in sample.verdict.parts.items():
            values[f"reward/{part}"].append(reward)
        if sample.problem.dataset:
            values[f"accuracy/{sample.problem.dataset}"].append(sample.verdict.outcome is Outcome.CORRECT)
    return {name: (sum(found), len(found)) for name, found in values.items()}
