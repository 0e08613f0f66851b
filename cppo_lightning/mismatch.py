"""Ratios that start at pi_old, and the correction for what then lies between it and the engine's mu.

mu is the distribution that an engine reports for the tokens it drew.  pi_old is the trainer's own recomputation with the same
weights, and differs from mu by numerics alone (other kernels, other precision).  A ratio pi / mu needs no correction: it is the
importance weight.  A ratio pi / pi_old leaves out w = pi_old / mu, and the corrections here put a bounded f(w) in its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch

from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
from cppo_lightning.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from cppo_lightning.trust_regions import TrustRegion

Anchor = Literal["rollout", "recomputed"]


class MismatchCorrection(ABC):
    """f(w): what a token's gradient is multiplied by.  Children are frozen dataclasses, chosen in YAML by ``class_path``."""

    @abstractmethod
    def __call__(self, ratio: Tensor) -> Tensor:
        """w = pi_old / mu ``[B, T]``, float32 and 1 where masked, to a factor >= 0 ``[B, T]``; rows are whole responses."""


@dataclass(frozen=True)
class TruncatedImportance(MismatchCorrection):
    """Token-level truncated importance sampling (TIS): min(w, cap).

    Args:
        cap: largest factor (usual: 1.5 to 5).

    Raises:
        ConfigError: ``cap`` not above 0.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ConfigError(f"TruncatedImportance.cap must be above 0 (usual: 2), got {self.cap}")

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(max=self.cap)


@dataclass(frozen=True)
class TokenMask(MismatchCorrection):
    """Token-level masked importance sampling (MIS): w where low <= w <= high, else 0.

    The defaults are MIS; ``TokenMask(0.5, 5.0)`` is IcePop.  A token that gets 0 stays in the loss's denominator.

    Args:
        low: smallest w that is used.
        high: largest w that is used.

    Raises:
        ConfigError: not 0 <= low < high.
    """

    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError(
                f"TokenMask needs 0 <= low < high (MIS: 0 and 2; IcePop: 0.5 and 5), got low {self.low} and high {self.high}"
            )

    def __call__(self, ratio: Tensor) -> Tensor:
        # filled, not multiplied: an overflowed w times 0 would be NaN
        return ratio.masked_fill((ratio < self.low) | (ratio > self.high), 0.0)


@dataclass
class RecomputedBatch(RolloutBatch):
    """A minibatch that carries pi_old beside mu."""

    old_logp: Tensor | None = None  # [B, T] float32, log pi_old(y_t | s_t), 0 where masked

    def select(self, rows: Tensor) -> Self:
        part = super().select(rows)
        assert part.old_logp is not None
        return replace(part, old_logp=part.old_logp[:, : part.response_ids.shape[1]])

    @classmethod
    def assemble(cls, batch: RolloutBatch, parts: Sequence[RolloutBatch], logp: Sequence[Tensor]) -> Self:
        """``batch`` with what the policy gave for the micro-batches ``parts`` of ``numbered(batch)``.

        Parts without a trainable token, which are there for the collectives alone, add nothing.
        """
        out = torch.zeros_like(batch.rollout_logp)
        for part, values in zip(parts, logp, strict=True):
            if len(batch):
                assert part.sample is not None, "numbered() gives it"
                out[part.sample.to(out.device), : values.shape[1]] += values.to(out.device)
        return cls(**{f.name: getattr(batch, f.name) for f in fields(batch)} | {"old_logp": out})


def numbered(batch: RolloutBatch) -> RolloutBatch:
    """``batch`` without its top-K, ``sample`` holding the rows' numbers: micro-batches are sorted, rows must find back."""
    rows = torch.arange(len(batch), device=batch.group.device)
    return replace(batch, sample=rows, topk_ids=None, topk_rollout_logp=None)


def decoupled_gate(
    trust_region: Callable[[TokenStats], Gate], stats: TokenStats, batch: RolloutBatch, correction: MismatchCorrection | None
) -> Gate:
    """The gate of a trust region whose ratio is pi / pi_old, times f(pi_old / mu).

    Args:
        trust_region: sees ``stats`` with pi_old in the place of mu.
        stats: statistics of the batch, with mu.
        batch: carries log pi_old.
        correction: f; None for 1.

    Returns:
        The gate with ``weight`` (and the objective's value, diagnostic ``surrogate``) multiplied by f, and f itself as
        diagnostic ``mismatch_weight`` ``[B, T]``.  ``keep`` stays the trust region's decision.

    Raises:
        TypeError: the batch carries no pi_old; a datamodule has to call ``RLVRModule.recompute`` on every minibatch of a
            rollout before the first is trained on.
    """
    if not isinstance(batch, RecomputedBatch) or batch.old_logp is None:
        raise TypeError(f"model.anchor is recomputed, but the {type(batch).__name__} was not passed to RLVRModule.recompute")
    gate = trust_region(replace(stats, rollout_logp=batch.old_logp))
    if correction is None:
        return gate
    factor = correction((batch.old_logp - stats.rollout_logp).masked_fill(~stats.mask, 0.0).exp())
    diagnostics = {**gate.diagnostics, "mismatch_weight": factor.masked_fill(~stats.mask, 0.0)}
    if "surrogate" in gate.diagnostics:
        diagnostics["surrogate"] = gate.diagnostics["surrogate"] * factor
    return replace(gate, weight=gate.weight * factor, diagnostics=diagnostics)


def check_anchor(trust_region: TrustRegion, anchor: Anchor, correction: MismatchCorrection | None) -> None:
    """Refuse what would be wrong without any sign of it.

    A trust region whose ratio may be pi / pi_old says so by ``recomputable``.  DPPO, CPPO, TRM and
    MinPRO must not: they limit how far pi is from mu, and DPPO collapses with pi_old in its place (arXiv 2602.04879, Sec. 5.2).

    Raises:
        ConfigError: a correction on ratios that start at mu, which would count it twice; pi_old under a trust region that is
            defined against mu; an unknown anchor.
    """
    if anchor not in ("rollout", "recomputed"):
        raise ConfigError(f"model.anchor must be rollout or recomputed, got {anchor!r}")
    if anchor == "rollout":
        if correction is not None:
            raise ConfigError(
                f"model.mismatch = {correction} corrects ratios pi / pi_old, but with model.anchor = rollout they are pi / mu "
                "and hold the correction already; set model.mismatch: null, or model.anchor: recomputed"
            )
    elif not trust_region.recomputable:
        name = type(trust_region).__name__
        raise ConfigError(
            f"model.anchor = recomputed puts pi_old in the place of mu, which {name} is not defined for: what it limits is the "
            "distance from mu; set model.anchor: rollout, or take a trust region on the ratio pi / pi_old, such as PPOClip"
        )


# mean and largest: at least three times the mean and six times the maximum over 2,000 tokens of SmolLM2-135M in float32 and
# bfloat16 (benchmarks/mismatch.py); float16 has three bits more than bfloat16
USUAL_BOUNDS = {"float32": (1e-4, 1e-3), "float16": (0.02, 0.5), "bfloat16": (0.1, 3.0)}


@dataclass(frozen=True)
class GapBounds:
    """How far log-probabilities of sampled tokens may differ between engine and trainer at equal weights, in nats.

    Args:
        mean: over tokens; None for the usual bound of the dtype.
        largest: of any one token; None for the usual bound of the dtype.

    Raises:
        ConfigError: a bound that is not above 0.
    """

    mean: float | None = None
    largest: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_mean_gap", self.mean), ("max_gap", self.largest)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0 nats, or null for the dtype's usual bound, got {value}")

    def judge(self, mean: float, largest: float, dtype: str) -> tuple[bool, str]:
        """Whether a gap lies within the bounds (not a number does not), and both in words."""
        usual_mean, usual_largest = USUAL_BOUNDS[dtype]
        most_mean, most = self.mean or usual_mean, self.largest or usual_largest
        words = f"by {mean:.2g} nats on average (bound {most_mean:g}) and by {largest:.2g} at most (bound {most:g})"
        return mean <= most_mean and largest <= most, words


def coarsest(engine_dtype: str, policy_dtype: str, precision: str) -> str:
    """The dtype with the widest usual bounds; ``precision`` is the Trainer's, and an unknown dtype counts as bfloat16."""
    computes = "bfloat16" if "bf16" in precision else "float16" if "16" in precision else policy_dtype
    known = [dtype if dtype in USUAL_BOUNDS else "bfloat16" for dtype in (engine_dtype, computes)]
    return max(known, key=USUAL_BOUNDS.__getitem__)


def check_staleness(batch: RolloutBatch, step: int, update: int, max_staleness: int = 0) -> None:
    """Refuse samples from weights that are older than the run allows.

    Args:
        batch: a minibatch, possibly without rows.
        step: optimizer steps that the policy has taken.
        update: number of updates that the batch's rollout has had before this one: on-policy rollouts are that old.
        max_staleness: optimizer steps by which a rollout's weights may be older at its first update.

    Raises:
        RolloutError: a sample is older, or claims weights that do not exist yet.
    """
    if not len(batch):
        return
    oldest, newest = int(batch.policy_version.min()), int(batch.policy_version.max())
    if not step - update - max_staleness <= oldest <= newest <= step:
        raise RolloutError(
            f"step {step}, update {update} of its rollout: samples come from weights that had seen {oldest} to {newest} steps, "
            f"allowed are {max(0, step - update - max_staleness)} to {step}; no step was taken on them; "
            "a loader that prefetches does this (a dataset without a length, num_workers above 0), or an engine without a sync"
        )
