"""The policy-gradient loss, its aggregations, and reference-KL estimators.

Losses are sums over coefficients that are decided once per optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]


@dataclass(frozen=True)
class Totals:
    """Counts over one whole optimizer step: all micro-batches, all ranks.  Scalars on the device."""

    tokens: Tensor
    sequences: Tensor


@dataclass(frozen=True)
class LossAggregation:
    """How per-token losses become one number.  Dropped tokens and responses stay in the denominator.

    Args:
        kind: ``token-mean`` divides by all trainable tokens (DAPO); ``seq-mean-token-mean`` averages each response, then
            the responses (GRPO); ``seq-mean-token-sum-norm`` divides each response's sum by a constant horizon (Dr.GRPO).
        horizon: that constant, in tokens; usually the longest response allowed.

    Raises:
        ConfigError: unknown kind, or a horizon missing or given where it is not used.
    """

    kind: Aggregation = "token-mean"
    horizon: int | None = None

    def __post_init__(self) -> None:
        kinds = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
        if self.kind not in kinds:
            raise ConfigError(f"aggregation.kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        if (self.kind == "seq-mean-token-sum-norm") != (self.horizon is not None):
            raise ConfigError(
                f"aggregation.horizon (tokens) goes with kind seq-mean-token-sum-norm and only with it, "
                f"got kind {self.kind!r} and horizon {self.horizon}"
            )
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(f"aggregation.horizon must be at least 1 token, got {self.horizon}")

    def coefficients(self, mask: Tensor, totals: Totals) -> Tensor:
        """Factor of each token's loss, ``[B, T]`` float32, 0 where masked; a step's sum needs no further division."""
        if self.kind == "token-mean":
            return mask.float() / totals.tokens
        length = mask.sum(-1, keepdim=True).clamp(min=1) if self.horizon is None else self.horizon
        return mask.float() / (length * totals.sequences)


@dataclass(frozen=True)
class ReferenceKL:
    """Penalty on the divergence from a frozen reference policy, estimated on the sampled tokens.

    With d = log pi - log ref (Schulman's estimators; the last two pass k2's gradient straight through):

    ======  ================  ============================  =======================================
    name    value             its expectation under pi      expected gradient under pi
    ======  ================  ============================  =======================================
    k1      d                 KL(pi || ref)                 0: no penalty at all
    k2      d^2 / 2           close to it near ref          that of KL(pi || ref)
    k3      exp(-d) + d - 1   KL(pi || ref)                 that of KL(ref || pi), the other way round
    k1+     d                 KL(pi || ref)                 that of KL(pi || ref)
    k3+     exp(-d) + d - 1   KL(pi || ref)                 that of KL(pi || ref)
    ======  ================  ============================  =======================================

    Tokens come from mu, so after a rollout's first update these expectations hold up to pi / mu, which is left out here.

    Args:
        coef: weight beta of the penalty (DeepSeekMath uses 0.04); above 0, since without a penalty no reference is loaded.
        estimator: k1, k2, k3, k1+ or k3+; GRPO uses k3.

    Raises:
        ConfigError: a coefficient not above 0, or an unknown estimator.
    """

    coef: float
    estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        if self.coef <= 0:
            raise ConfigError(f"reference_kl.coef must be above 0, got {self.coef}; for no penalty set reference_kl: null")
        if self.estimator not in ("k1", "k2", "k3", "k1+", "k3+"):
            raise ConfigError(f"reference_kl.estimator must be k1, k2, k3, k1+ or k3+, got {self.estimator!r}")

    def __call__(self, logp: Tensor, reference_logp: Tensor) -> Tensor:
        """Per-token estimate ``[B, T]`` in nats, differentiable in ``logp``."""
        d = logp - reference_logp
        k2 = 0.5 * d.square()
        if self.estimator == "k2":
            return k2
        value = d if self.estimator in ("k1", "k1+") else (-d).exp() + d - 1
        # the difference is exactly 0 and has k2's gradient
        return value.detach() + (k2 - k2.detach()) if self.estimator.endswith("+") else value


def policy_gradient_loss(logp: Tensor, advantages: Tensor, gate: Gate, coefficients: Tensor) -> Tensor:
    """Scalar whose gradient is that of the surrogate: ``-sum coef_t * weight_t * A_t * log pi(y_t)``.

    All inputs are ``[B, T]``; only ``logp`` carries a gradient.  Tokens with coefficient 0 (padding) may hold anything.
    """
    return -_weighted_sum(gate.weight.detach() * advantages * logp, coefficients)


def surrogate_value(advantages: Tensor, gate: Gate, coefficients: Tensor) -> Tensor:
    """The objective's value with the same normalisation, for logs and tests (a scalar without gradient)."""
    return _weighted_sum(gate.diagnostics.get("surrogate", gate.weight * advantages), coefficients)


def _weighted_sum(per_token: Tensor, coefficients: Tensor) -> Tensor:
    # filled, not multiplied: 0 times an infinity would be NaN
    return (coefficients * per_token).masked_fill(coefficients == 0, 0.0).sum()
