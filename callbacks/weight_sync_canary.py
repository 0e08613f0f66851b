"""Proof that the engine samples with the weights that are being trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import over_ranks, rollout_data
from cppo_lightning.engines.checksums import checksums
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.metrics import log_metrics
from cppo_lightning.mismatch import GapBounds, coarsest
from cppo_lightning.ranks import with_same_batch
from cppo_lightning.rollout.collate import collate
from cppo_lightning.rollout.sampler import Sample
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import RolloutBatch
    from cppo_lightning.engines.engine import Completion, RolloutEngine
    from cppo_lightning.module import RLVRModule

PROMPTS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):", "12 + 30 = 42, and 7 * 6 =")


class WeightSyncCanary(Callback):
    """Stops a run whose engine does not sample with the policy's weights, before anything is trained on what it sampled.

    After a sync, and before the first update on the rollout that came of it, the engine continues fixed texts with a fixed
    seed, and the trainer scores the same tokens.  The run goes on if their log-probabilities agree within the bounds and every
    parameter has the same checksum on both sides (of its bits in the engine's dtype, for engines that tell theirs).  It changes
    nothing that the run trains on, and waits for no rollout that is being drawn ahead: an engine that draws one can answer
    several calls at once.  Logs ``canary/logp_gap_mean`` and ``canary/logp_gap_max`` in nats, of the worst rank.

    Bounds, unless given, follow the coarsest dtype of engine, policy and Trainer: ``USUAL_BOUNDS`` in mismatch.py.
    In bf16 numerics hide a small update, which checksums alone can see.

    Args:
        every_n_syncs: syncs from one check to the next; the first is always checked.
        prompts: texts to continue, the same on every rank; null for four short ones.
        max_tokens: longest continuation, in tokens.
        max_mean_gap: largest mean |log pi - log mu| in nats; null for the usual bound.
        max_gap: largest |log pi - log mu| of any token; null for the usual bound.

    Raises:
        ConfigError: a value that cannot work.
        RolloutError: during training, the engine has other weights; with the parameters' names.
    """

    def __init__(
        self,
        every_n_syncs: int = 1,
        prompts: Sequence[str] | None = None,
        max_tokens: int = 16,
        max_mean_gap: float | None = None,
        max_gap: float | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("every_n_syncs", every_n_syncs), ("max_tokens", max_tokens)):
            if value < 1:
                raise ConfigError(f"WeightSyncCanary.{key} must be at least 1, got {value}")
        if prompts is not None and (not prompts or not all(prompts)):
            raise ConfigError(f"WeightSyncCanary.prompts must hold texts, none of them empty, got {list(prompts)}")
        self.every_n_syncs = every_n_syncs
        self.prompts = list(prompts or PROMPTS)
        self.max_tokens = max_tokens
        self.bounds = GapBounds(max_mean_gap, max_gap)
        self._syncs = 0
        self._seen: int | None = None  # version of the engine's weights at the last sync

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)
            self._syncs, self._seen = 0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update: before the first one on newly synced weights it checks them."""
        version = rollout_data(trainer, type(self).__name__).sampler.engine.version
        if batch_idx > 0 or version == self._seen or version != trainer.global_step:
            return
        self._seen = version
        if self._syncs % self.every_n_syncs == 0:
            self.check(trainer, cast("RLVRModule", pl_module))
        self._syncs += 1

    def check(self, trainer: Trainer, module: RLVRModule) -> None:
        """Compare the engine's weights with the policy's as they are; every rank must call it.

        Raises:
            RolloutError: they differ, on any rank.
        """
        data = rollout_data(trainer, type(self).__name__)
        engine, tokenizer = data.sampler.engine, data.sampler.tokenizer
        prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.prompts]
        completions = engine.generate(prompts, 1, replace(data.sampling, max_tokens=self.max_tokens), seed=0)
        # ranks that compute each layer together have to score the same tokens
        found = [pair for pairs in with_same_batch(trainer, (prompts, completions)) for pair in zip(*pairs, strict=True)]
        gaps = _gaps(module, as_batch([p for p, _ in found], [c for _, c in found], engine.version))
        worst = torch.stack([gaps.mean(), gaps.max()]).nan_to_num(torch.inf).to(module.device)
        mean, largest = trainer.strategy.reduce(worst, reduce_op="max").tolist()
        different = over_ranks(_differing(module, engine))
        log_metrics(trainer, {"canary/logp_gap_mean": mean, "canary/logp_gap_max": largest})
        dtype = coarsest(dtype_of(engine), module.policy_config.dtype, str(trainer.precision))
        within, gap = self.bounds.judge(mean, largest, dtype)
        if different or not within:
            raise RolloutError(
                f"WeightSyncCanary, step {trainer.global_step}: the engine does not compute with the policy's weights. "
                f"{_named(different)}; log-probabilities of {len(gaps)} tokens differ {gap}. Nothing was trained on what it "
                "sampled, and the policy is in order: mend or restart the engine and resume from the last checkpoint "
                "(--ckpt_path)"
            )


def as_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], version: int, top_k: int = 0) -> RolloutBatch:
    """Completions that nobody judges as a batch to score: their rewards and advantages are 0."""
    problem, verdict = Problem("canary", (), ""), Verdict(Outcome.UNPARSEABLE, 0.0)
    rows = [Sample(problem, list(p), c, "", verdict) for p, c in zip(prompts, completions, strict=True)]
    return collate(rows, [0.0] * len(rows), range(len(rows)), 1, version, top_k, pad_id=0)


def dtype_of(engine: RolloutEngine) -> str:
    """The dtype of the engine's weights, as it calls it; empty where it names none."""
    return str(getattr(engine, "dtype", ""))


def _gaps(module: RLVRModule, batch: RolloutBatch) -> Tensor:
    """|log pi - log mu| of every token, ``[N]`` float32, pi as the module scores rollouts."""
    scored = module.recompute(batch)
    assert scored.old_logp is not None
    return (scored.old_logp - batch.rollout_logp)[batch.response_mask].abs()


def _differing(module: RLVRModule, engine: RolloutEngine) -> list[str]:
    """Parameters that the engine has not, or with other bits than the policy's have in its dtype; none if it does not tell."""
    theirs = engine.checksums()
    if theirs is None:
        return []
    ours = checksums(module.named_weights(), getattr(torch, dtype_of(engine)))
    return [name for name, value in ours.items() if theirs.get(name) != value]


def _named(different: Sequence[str], most: int = 10) -> str:
    if not different:
        return "No parameter's checksum tells them apart (an engine may tell none)"
    more = f" and {len(different) - most} more" if len(different) > most else ""
    return f"Checksums differ for {', '.join(different[:most])}{more}"
