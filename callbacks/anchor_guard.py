"""Refuses to train on ratios whose denominator is not what the engine drew from."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.logprob_gap import GAP_MAX, GAP_MEAN, gap_maxima, gap_totals
from cppo_lightning.callbacks.reporting import rollout_data
from cppo_lightning.callbacks.weight_sync_canary import dtype_of
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.metrics import Maxima, WeightedMeans, drain, masked_total
from cppo_lightning.mismatch import GapBounds, coarsest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
    from cppo_lightning.module import RLVRModule
    from cppo_lightning.rollout.sampler import Rollout

ABOVE = "above"  # share of tokens that the engine calls likelier than the trainer does


class AnchorGuard(Callback):
    """Checks, before the first optimizer step of a run, that mu is the distribution that the engine sampled from.

    It refuses to train, and says what to change, when

    - engine and policy take their softmax at different temperatures (on the command line the two are linked),
    - a batch carries other log-probabilities than the engine returned for the same tokens, for example recomputed ones: these
      have a place of their own, ``model.anchor``, under trust regions that are defined for them,
    - on the first batch, where both have the same weights, log pi and log mu differ by more than the bounds.  Log mu above
      log pi at nearly every token is what truncated sampling does, and the message says so.

    What a constructor can see is refused there: truncated sampling by ``RolloutDataModule``, a recomputed anchor under a trust
    region that is defined against mu by ``RLVRModule``.

    Args:
        max_mean_gap: largest mean |log pi - log mu| in nats; null for the usual bound of the coarsest dtype involved
            (``USUAL_BOUNDS`` in mismatch.py: 1e-4 for float32, 0.1 for bfloat16).
        max_gap: the same of any one token (1e-3 for float32, 3 for bfloat16).

    Raises:
        ConfigError: a bound not above 0; when training is set up, different temperatures; before the first step, other
            log-probabilities than the engine's.
        RolloutError: before the first step, a gap beyond a bound.
    """

    def __init__(self, max_mean_gap: float | None = None, max_gap: float | None = None) -> None:
        super().__init__()
        self.bounds = GapBounds(max_mean_gap, max_gap)
        self._means = WeightedMeans([GAP_MEAN, ABOVE])
        self._maxima = Maxima([GAP_MAX])
        self._passed = False
        self._watching = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: compares the temperatures."""
        if stage != "fit":
            return
        sampled, trained = rollout_data(trainer, type(self).__name__).sampling.temperature, pl_module.temperature
        if sampled != trained:
            raise ConfigError(
                f"AnchorGuard: data.sampling.temperature is {sampled} and model.temperature {trained}, so mu and pi differ "
                f"even at equal weights; give both the same, for example model.temperature {sampled}"
            )
        self._passed = self._watching = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update: on the first batch that the policy's own weights sampled, it begins to watch."""
        self._watching = not self._passed and bool((batch.policy_version == trainer.global_step).all())
        rollout = rollout_data(trainer, type(self).__name__).rollout
        if self._watching and rollout is not None:
            _check_origin(batch, rollout)

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the first batch's sums."""
        if self._watching:
            above = stats.rollout_logp > stats.logp
            self._means.update({GAP_MEAN: gap_totals(stats)[GAP_MEAN], ABOVE: masked_total(above, stats.mask)})
            self._maxima.update({GAP_MAX: gap_maxima(stats)[GAP_MAX]})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Runs after all micro-batches' backward passes and before the step: judges the first batch, over all ranks."""
        if self._passed:  # the same on every rank, which whether one's own part of the batch is on-policy need not be
            return
        means, maxima = drain(self._means, pl_module.device), drain(self._maxima, pl_module.device)
        if not means:
            return
        module, engine = cast("RLVRModule", pl_module), rollout_data(trainer, type(self).__name__).sampler.engine
        dtype = coarsest(dtype_of(engine), module.policy_config.dtype, str(trainer.precision))
        within, gap = self.bounds.judge(means[GAP_MEAN], maxima[GAP_MAX], dtype)
        if not within:
            raise RolloutError(
                f"AnchorGuard: on the first batch, at equal weights, engine and trainer differ {gap}; no step was taken. "
                f"{_cause(means[ABOVE])}. If your numerics cost that much, raise AnchorGuard's max_mean_gap and max_gap, "
                "or set data.engine's dtype to float32"
            )
        self._passed = True


def _check_origin(batch: RolloutBatch, rollout: Rollout) -> None:
    """Compare each response's log-probabilities with the engine's own; one that the rollout does not hold is passed over."""
    drawn: dict[bytes, list[Tensor]] = {}
    for sample in rollout.samples:
        drawn.setdefault(sample.completion.ids.numpy().tobytes(), []).append(sample.completion.logp)
    other = 0
    columns = (batch.response_ids.cpu(), batch.rollout_logp.cpu(), batch.response_mask.cpu())
    for ids, logp, mask in zip(*columns, strict=True):
        end = int(mask.nonzero().max()) + 1 if mask.any() else 0
        own = drawn.get(ids[:end].numpy().tobytes(), [])
        other += bool(own) and not any(torch.equal(logp[:end][mask[:end]], mu[mask[:end]]) for mu in own)
    if other:
        raise ConfigError(
            f"AnchorGuard: {other} of {len(batch)} responses of the first batch carry other log-probabilities than the engine "
            "returned, so mu is not what sampled them: leave RolloutBatch.rollout_logp as it came; log-probabilities that the "
            "trainer recomputes belong to model.anchor: recomputed"
        )


def _cause(above: float) -> str:
    if above > 0.95:
        return (
            f"Log mu is above log pi at {above:.0%} of the tokens, as it is when sampling is truncated: let neither top_p, "
            "top_k nor min_p cut the distribution, nor the engine's or a server's own defaults"
        )
    return (
        "Usual causes: weights that the engine was not given (callback WeightSyncCanary names them), a quantised model or "
        "cache, a server with a temperature or a chat template of its own"
    )
