"""The LightningModule: policy, frozen reference and trust region.  ``training_step`` is one optimizer step."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.lora import without_adapters
from cppo_lightning.losses import LossAggregation, ReferenceKL, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.metrics import log_metrics
from cppo_lightning.mismatch import (
    Anchor,
    MismatchCorrection,
    RecomputedBatch,
    check_anchor,
    check_staleness,
    decoupled_gate,
    numbered,
)
from cppo_lightning.observers import GateObserver, NonFiniteObserver, observers
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig, check_attention, check_precision
from cppo_lightning.ranks import data_share, data_sum
from cppo_lightning.resume import check_same_model, settle_loops
from cppo_lightning.sequences import MicroBatch, micro_batches
from cppo_lightning.strategies import FSDP2, ReadsShards, WeightsInBF16, check_strategy, gradients_kept_apart
from cppo_lightning.trust_regions import TrustRegion
from cppo_lightning.untrusted import check_no_code, refusing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

    from cppo_lightning.rollout.evaluation import EvaluationBatch
    from cppo_lightning.rollout.stream import RolloutPlan


class RLVRModule(LightningModule):
    """Trains a causal LM on verified rollouts under a trust region.

    Args:
        policy: which model is trained.
        trust_region: decides per token where the policy may move.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes a learning-rate schedule from the optimizer, stepped once per optimizer step; None for a constant.
        aggregation: how token losses become one number.
        reference_kl: penalty on the divergence from the initial policy, which is loaded a second time unless ``policy.lora``
            leaves it in place; None for none.
        temperature: temperature that rollouts are sampled at (linked to ``data.sampling.temperature`` on the command line).
        micro_batch_tokens: padded tokens (prompt and response) in one forward pass.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        anchor: what ratios are taken against: ``rollout`` is mu, as the engine reported it; ``recomputed`` is pi_old, computed
            here with the weights that sampled, at the cost of one more forward pass over each rollout.
        mismatch: correction for the difference between pi_old and mu, only with ``anchor: recomputed``; None for none.

    Raises:
        ConfigError: a value outside its range, an anchor that the trust region or the correction does not go with, or a model
            that only code of its own could load.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        trust_region: TrustRegion,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        aggregation: LossAggregation = LossAggregation(),
        reference_kl: ReferenceKL | None = None,
        temperature: float = 1.0,
        micro_batch_tokens: int = 16384,
        max_grad_norm: float | None = 1.0,
        anchor: Anchor = "rollout",
        mismatch: MismatchCorrection | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ConfigError(f"model.temperature must be above 0 and finite to train on, got {temperature}")
        if micro_batch_tokens < 1:
            raise ConfigError(f"model.micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ConfigError(f"model.max_grad_norm must be above 0 and finite, or null for no clipping, got {max_grad_norm}")
        check_anchor(trust_region, anchor, mismatch)
        check_no_code(policy.path)
        self.automatic_optimization = False
        self.policy_config = policy
        self.trust_region = trust_region
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.aggregation = aggregation
        self.reference_kl = reference_kl
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.max_grad_norm = max_grad_norm
        self.anchor: Anchor = anchor
        self.mismatch = mismatch
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self._loaded_version: int | None = None  # of weights that a checkpoint brought, until they are trained on

    def setup(self, stage: str) -> None:
        """Runs before any checkpoint is read, and sees to it that none is unpickled, wherever it comes from.

        Raises:
            ConfigError: ``trainer.precision`` that updates would be lost in, attention that has no gradient on the device, or a
                strategy that weights cannot be had from.
        """
        check_precision(self.trainer.precision, self.policy_config.dtype)
        strategy = self.trainer.strategy
        check_strategy(strategy)
        if stage == "fit":
            check_attention(self.policy_config.attn_implementation, strategy.root_device)
        if not isinstance(strategy.checkpoint_io, ReadsShards):
            strategy.checkpoint_io = ReadsShards(strategy.checkpoint_io)
        if self.trainer.precision == "bf16-true":
            strategy.precision_plugin = WeightsInBF16()

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        strategy = None if self._trainer is None else self._trainer.strategy
        load = strategy.load_policy if isinstance(strategy, FSDP2) else Policy.load
        config = self.policy_config if strategy is None else self.policy_config.under(self.trainer.precision)
        self.policy = load(config)
        if self.reference_kl is not None and config.lora is None:
            self.reference = load(config).eval().requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self._policy().parameters() if p.requires_grad])
        if self.make_lr_scheduler is None:
            return optimizer
        schedule = self.make_lr_scheduler(optimizer)
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("model.lr_scheduler: ReduceLROnPlateau waits for a metric; take one that counts optimizer steps")
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by Hugging Face name, for a rollout engine."""
        return self._policy().named_weights()

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen; of a checkpoint that is only evaluated the trainer does not know them."""
        return self.trainer.global_step if self._loaded_version is None else self._loaded_version

    def on_train_start(self) -> None:
        self._loaded_version = None

    @torch.no_grad()
    def recompute(self, batch: RolloutBatch) -> RecomputedBatch:
        """``batch`` with log pi_old, the policy's log-probabilities of its tokens as they are now.

        It is cut as in training, so that at a rollout's first update pi / pi_old is 1.  Every rank must call it.
        """
        parts = self._micro_batches(numbered(batch).to(self.trainer.strategy.root_device))
        with self.trainer.precision_plugin.train_step_context():
            logp = [self._policy()(part.batch, self.temperature, part.sequences).logp for part in parts]
        return RecomputedBatch.assemble(batch, [part.batch for part in parts], logp)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """One optimizer step on one minibatch; None when there was nothing to train on or the gradient was not finite.

        Raises:
            RolloutError: samples are older than ``plan.steps * (1 + plan.max_staleness) - 1`` optimizer steps.
        """
        started = time.perf_counter()
        self._check_age(batch, batch_idx)
        totals = self._totals(batch)
        if not int(totals.tokens):
            if batch_idx == 0:  # groups are dealt evenly, so the whole rollout is empty
                rank_zero_warn("in every group of a rollout all rewards are equal, so it teaches nothing and no step is taken")
            return None
        *others, last = self._micro_batches(batch)
        with gradients_kept_apart(self.trainer.strategy):
            terms = [self._accumulate(part, totals) for part in others]
        mine = torch.stack([*terms, self._accumulate(last, totals)]).sum(0)
        values = data_sum(self.trainer, mine.clone())
        learning_rate = self._optimizer().param_groups[0]["lr"]
        grad_norm = self._grad_norm()
        if not bool(grad_norm.isfinite() & values[:2].isfinite().all()):  # the same on every rank
            self._skip_step(batch, mine[:2], grad_norm)
            return None
        self._step(grad_norm)
        surrogate, reference_kl, entropy = values.tolist()
        loss = -surrogate
        logs = {
            "train/surrogate": surrogate,
            "train/entropy": entropy,
            "train/grad_norm": float(grad_norm),
            "train/learning_rate": learning_rate,
            "train/tokens_per_second": int(totals.tokens) / (time.perf_counter() - started),
        }
        if self.reference_kl is not None:
            loss += self.reference_kl.coef * reference_kl
            logs["train/reference_kl"] = reference_kl
        # a step's metrics stand at the number of steps taken before it
        log_metrics(self.trainer, {"train/loss": loss, **logs}, step=self.global_step - 1)
        return {"loss": torch.tensor(loss)}

    def _check_age(self, batch: RolloutBatch, batch_idx: int) -> None:
        plan: RolloutPlan | None = getattr(getattr(self.trainer, "datamodule", None), "plan", None)
        if plan is None:  # a loader of the user's own: its epochs are its rollouts
            check_staleness(batch, self.global_step, batch_idx)
        else:
            check_staleness(batch, self.global_step, batch_idx % plan.steps, plan.steps * plan.max_staleness)

    def _grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self._policy().parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _step(self, grad_norm: Tensor) -> None:
        optimizer = self._optimizer()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._policy().parameters(), self.max_grad_norm, grad_norm)
        optimizer.step()
        if self.make_lr_scheduler is not None:
            cast("LRScheduler", self.lr_schedulers()).step()
        optimizer.zero_grad()

    def _skip_step(self, batch: RolloutBatch, terms: Tensor, grad_norm: Tensor) -> None:
        rank_zero_warn(
            f"step {self.global_step}: the loss or the gradient is not finite (norm {float(grad_norm)}); no step was taken, "
            "and the weights are unchanged"
        )
        for observer in observers(self.trainer, NonFiniteObserver):
            observer.on_nonfinite_step(self.trainer, self, batch, terms)
        self._optimizer().zero_grad()

    def _accumulate(self, part: MicroBatch, totals: Totals) -> Tensor:
        """Add one micro-batch's gradient; returns its shares ``[3]`` of surrogate, reference KL and mean entropy."""
        batch = part.batch
        output = self._policy()(batch, self.temperature, part.sequences)
        stats = batch.stats(output.logp.detach(), output.topk_logp)
        if self.anchor == "rollout":
            gate = self.trust_region(stats)
        else:
            gate = decoupled_gate(self.trust_region, stats, batch, self.mismatch)
        for observer in observers(self.trainer, GateObserver):
            observer.on_gate(self.trainer, self, stats, gate)
        coefficients = self.aggregation.coefficients(stats.mask, totals)
        loss = policy_gradient_loss(output.logp, stats.advantages, gate, coefficients)
        reference_kl = loss.new_zeros(())
        if self.reference_kl is not None:
            reference_kl = (coefficients * self.reference_kl(output.logp, self._reference_logp(part))).sum()
            loss = loss + self.reference_kl.coef * reference_kl
        # ranks average their gradients, while the denominators are already global
        _, ranks = data_share(self.trainer)
        self.manual_backward(loss * ranks)
        surrogate = surrogate_value(stats.advantages, gate, coefficients)
        return torch.stack([surrogate, reference_kl.detach(), output.entropy.sum() / totals.tokens])

    @torch.no_grad()
    def _reference_logp(self, part: MicroBatch) -> Tensor:
        """``[B, T]`` log-probabilities under the initial policy, which adapters leave in place."""
        read = (replace(part.batch, topk_ids=None), self.temperature, part.sequences)
        if self.reference is not None:
            return self.reference(*read).logp
        with without_adapters(self._policy()):
            return self._policy()(*read).logp

    def _micro_batches(self, batch: RolloutBatch) -> list[MicroBatch]:
        """This rank's micro-batches, filled up with blank ones to the longest rank's count: collectives must match."""
        parts = micro_batches(batch, self.micro_batch_tokens, self._policy().work)
        count = int(self.trainer.strategy.reduce(torch.tensor(len(parts), device=batch.response_ids.device), reduce_op="max"))
        return parts + [MicroBatch.blank(batch)] * (count - len(parts))

    def _totals(self, batch: RolloutBatch) -> Totals:
        counts = torch.stack([batch.num_tokens, batch.response_mask.any(-1).sum()])
        tokens, sequences = data_sum(self.trainer, counts)
        return Totals(tokens, sequences)

    def _optimizer(self) -> LightningOptimizer:
        return cast("LightningOptimizer", self.optimizers())

    def _policy(self) -> Policy:
        if self.policy is None:
            raise RuntimeError("the policy is loaded by configure_model, which the Trainer calls; call it first")
        return self.policy

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self._log_evaluation("val", batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self._log_evaluation("test", batch)

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[dict[str, Any]]:
        return batch.rows()

    def _log_evaluation(self, stage: str, batch: EvaluationBatch) -> None:
        # weighted by batch size here and over ranks, so that every sample counts once
        self.log_dict(batch.means(stage), batch_size=len(batch.rollout.samples), on_epoch=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The reference is the initial model and is loaded from there, not from checkpoints."""
        weights = checkpoint["state_dict"]
        for name in [n for n in weights if n.startswith("reference.")]:
            del weights[name]
        checkpoint["trust_region"] = self.trust_region.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's; raises :class:`ConfigError` for the weights of another model, of all of whose names torch would tell."""
        if strict:
            own = self.state_dict()
            check_same_model({name: tensor.shape for name, tensor in state_dict.items()}, own, own.keys())
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settle_loops(checkpoint)
        self._loaded_version = checkpoint["global_step"]
        self.trust_region.load_state_dict(checkpoint.get("trust_region", {}))
        if self.reference is not None:
            checkpoint["state_dict"] |= {f"reference.{k}": v for k, v in self.reference.state_dict().items()}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, which needs ``policy`` and ``trust_region`` besides; only tensors and plain values are read."""
        with refusing(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})
