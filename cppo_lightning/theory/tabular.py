"""Policies as tables, and what enumeration says of a pair of them: J, L', Delta, D_t.  Shapes and units: the package."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cppo_lightning.theory.bounds import suffix_sum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TabularPolicy:
    """A policy given at every prefix.

    Args:
        log_probs: T tensors; number t (from 0) is ``[..., V^t, V]`` float64, log pi(. | prefix) for each prefix of t tokens.
            -inf is allowed, but mu may not have any ("common support").

    Raises:
        ValueError: no tensor, wrong shape or dtype, or a row whose probabilities do not sum to 1.
    """

    log_probs: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.log_probs:
            raise ValueError("TabularPolicy.log_probs is empty; give one tensor [..., V^t, V] for each position t")
        v = self.vocabulary
        for t, table in enumerate(self.log_probs):
            if table.dtype != torch.float64 or table.dim() < 2 or table.shape[-2:] != (v**t, v):
                got = f"{list(table.shape)} {table.dtype}"
                raise ValueError(f"TabularPolicy.log_probs[{t}] must be [..., {v**t}, {v}] torch.float64, got {got}")
            if not bool(((table.logsumexp(-1)).abs() <= 1e-9).all()):
                raise ValueError(f"TabularPolicy.log_probs[{t}] must have rows whose probabilities sum to 1; see from_logits")

    @classmethod
    def from_logits(cls, logits: tuple[Tensor, ...] | list[Tensor]) -> TabularPolicy:
        """From T tensors ``[..., V^t, V]`` of any floating dtype, normalised over the last axis."""
        return cls(tuple(table.double().log_softmax(-1) for table in logits))

    @property
    def vocabulary(self) -> int:
        return self.log_probs[0].shape[-1]

    @property
    def horizon(self) -> int:
        return len(self.log_probs)

    def prefix_probs(self) -> tuple[Tensor, ...]:
        """T + 1 tensors: number t is ``[..., V^t]``, the probability of each prefix of t tokens; the last, of each response."""
        start = torch.ones_like(self.log_probs[0][..., 0])
        return tuple(accumulate(self.log_probs, lambda p, table: (p[..., None] * table.exp()).flatten(-2), initial=start))


def expected_reward(policy: TabularPolicy, rewards: Tensor) -> Tensor:
    """J = E[R(y)] ``[...]`` (Sec. 2) of ``rewards`` ``[..., V^T]``.

    Raises:
        ValueError: ``rewards`` has another number of responses.
    """
    _check_rewards(policy, rewards)
    return (policy.prefix_probs()[-1] * rewards).sum(-1)


def surrogate(mu: TabularPolicy, pi: TabularPolicy, rewards: Tensor) -> Tensor:
    """L' = E_mu[R sum_t (rho_t - 1)] ``[...]`` (Eq. 1), what token-level objectives see of J(pi) - J(mu).

    Raises:
        ValueError: the policies do not fit each other or ``rewards`` ``[..., V^T]``, or mu excludes a token.
    """
    return _mean(mu, pi, rewards, _log_ratios(mu, pi).expm1().sum(-1))


def residual(mu: TabularPolicy, pi: TabularPolicy, rewards: Tensor) -> Tensor:
    """Delta = E_mu[R sum_t (rho_t - 1)(1 - rho_{t+1:T})] ``[...]``; J(pi) - J(mu) = L' - Delta exactly (Eq. 1, Lemma 2).

    Raises:
        ValueError: as :func:`surrogate`.
    """
    return _mean(mu, pi, rewards, _residual_integrand(mu, pi))


def hardest_rewards(mu: TabularPolicy, pi: TabularPolicy, xi: float = 1.0) -> Tensor:
    """The rewards ``[..., V^T]`` within +-xi that make Delta as large as it can be for these two policies.

    Raises:
        ValueError: the policies do not fit each other, or mu excludes a token.
    """
    return xi * _residual_integrand(mu, pi).sign()


def total_variation(mu: TabularPolicy, pi: TabularPolicy) -> tuple[Tensor, ...]:
    """D_t = 1/2 sum_v |pi(v) - mu(v)| at every prefix (Sec. 2.2): T tensors, number t (from 0) is ``[..., V^t]``.

    Raises:
        ValueError: the policies do not fit each other, or mu excludes a token.
    """
    _check_pair(mu, pi)
    pairs = zip(mu.log_probs, pi.log_probs, strict=True)
    # mu |rho - 1| keeps its digits where the difference of two probabilities would cancel them
    return tuple(0.5 * (m.exp() * (p - m).expm1().abs()).sum(-1) for m, p in pairs)


def mean_divergence(mu: TabularPolicy, pi: TabularPolicy) -> Tensor:
    """u_t = E_mu[D_t] ``[..., T]`` (Sec. 3.1).  Raises as :func:`total_variation`."""
    reached = zip(mu.prefix_probs(), total_variation(mu, pi), strict=False)  # the last entry is whole responses
    return torch.stack([(p * d).sum(-1) for p, d in reached], -1)


def max_divergence(mu: TabularPolicy, pi: TabularPolicy) -> Tensor:
    """The smallest pathwise limits, l_t = max over prefixes of D_t, ``[..., T]``.  Raises as :func:`total_variation`."""
    return torch.stack([d.amax(-1) for d in total_variation(mu, pi)], -1)


def _check_rewards(policy: TabularPolicy, rewards: Tensor) -> None:
    responses = policy.vocabulary**policy.horizon
    if rewards.shape[-1:] != (responses,):
        raise ValueError(f"rewards must be [..., V^T] with V^T = {responses}, got {list(rewards.shape)}")


def _check_pair(mu: TabularPolicy, pi: TabularPolicy) -> None:
    if (mu.vocabulary, mu.horizon) != (pi.vocabulary, pi.horizon):
        sizes = f"mu has V = {mu.vocabulary}, T = {mu.horizon} and pi has V = {pi.vocabulary}, T = {pi.horizon}"
        raise ValueError(f"mu and pi must share their vocabulary and horizon: {sizes}")
    if not all(bool(table.isfinite().all()) for table in mu.log_probs):
        raise ValueError("mu must give every token a probability above 0 (common support), else rho is not defined")


def _log_ratios(mu: TabularPolicy, pi: TabularPolicy) -> Tensor:
    """log rho_t along every response, ``[..., V^T, T]``."""
    _check_pair(mu, pi)
    v, horizon = mu.vocabulary, mu.horizon
    steps = [(p - m).flatten(-2) for m, p in zip(mu.log_probs, pi.log_probs, strict=True)]  # [..., V^t], t = 1..T
    return torch.stack([step.repeat_interleave(v ** (horizon - t), -1) for t, step in enumerate(steps, start=1)], -1)


def _residual_integrand(mu: TabularPolicy, pi: TabularPolicy) -> Tensor:
    """sum_t (rho_t - 1)(1 - rho_{t+1:T}) of every response, ``[..., V^T]``."""
    log_ratios = _log_ratios(mu, pi)
    return -(log_ratios.expm1() * suffix_sum(log_ratios).expm1()).sum(-1)


def _mean(mu: TabularPolicy, pi: TabularPolicy, rewards: Tensor, integrand: Tensor) -> Tensor:
    """E_mu[R integrand] ``[...]``."""
    _check_rewards(mu, rewards)
    return (mu.prefix_probs()[-1] * rewards * integrand).sum(-1)
