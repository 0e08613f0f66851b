"""Theorem 1 with its premises checked.  Shapes and units: the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from cppo_lightning.theory.bounds import prefix_penalty, suffix_linear
from cppo_lightning.theory.tabular import TabularPolicy, surrogate, total_variation

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-12  # a premise that is met with equality must not fail by a few float64 roundings


@dataclass(frozen=True)
class ImprovementBound:
    """J(pi) - J(mu) >= ``value``, proven where ``premises_hold``.  All tensors broadcast to ``[...]``."""

    surrogate: Tensor  # L', reward
    penalty: Tensor  # what |Delta| cannot exceed, reward
    thresholds_met: Tensor  # bool: w_t D_t <= c_t at every prefix
    budget_met: Tensor  # bool: P_m <= slack + delta_b W_m at every prefix, m < T
    order_met: Tensor  # bool: suffix_t / w_t does not increase with t

    @property
    def value(self) -> Tensor:
        """L' - penalty."""
        return self.surrogate - self.penalty

    @property
    def premises_hold(self) -> Tensor:
        return self.thresholds_met & self.budget_met & self.order_met


def improvement_bound(
    mu: TabularPolicy,
    pi: TabularPolicy,
    rewards: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    delta_b: Tensor | float,
    slack: Tensor | float = 0.0,
    suffix: Callable[[Tensor], Tensor] = suffix_linear,
    xi: float = 1.0,
) -> ImprovementBound:
    """Theorem 1 (Eq. 5 and 6): checks its premises at every prefix and gives its lower bound on J(pi) - J(mu).

    Args:
        mu: the policy that sampled; no token may be excluded.
        pi: the policy in training.
        rewards: R ``[..., V^T]``.
        weights: w ``[..., T]`` > 0, for instance CPPO's Eq. 9.
        thresholds: c ``[..., T]`` >= 0 on w_t D_t; constant for CPPO as implemented, ``weights * delta`` for Cor. 6.
        delta_b: prefix budget per unit of weight, >= 0, a number or ``[...]``.
        slack: added to every prefix's budget, >= 0, a number or ``[...]``: delta for what Eq. 8 lets through (Prop. 8).
        suffix: how the limits l_t = c_t / w_t bound a suffix; the paper's theorem has :func:`suffix_linear`, App. B.9
            :func:`suffix_product`.  The order premise is about the one given.
        xi: bound on |R|.

    Raises:
        ValueError: as :func:`surrogate`; or |R| > xi, or weights, thresholds, delta_b or slack out of range or of another T.
    """
    linear = surrogate(mu, pi, rewards)
    delta_b = torch.as_tensor(delta_b, dtype=linear.dtype, device=linear.device)
    slack = torch.as_tensor(slack, dtype=linear.dtype, device=linear.device)
    for name, values in (("weights", weights), ("thresholds", thresholds)):
        if values.shape[-1:] != (mu.horizon,):
            raise ValueError(f"{name} must be [..., T] with T = {mu.horizon}, got {list(values.shape)}")
    _check("rewards", rewards, rewards.abs() <= xi, f"within +-xi = {xi}")
    _check("weights", weights, weights > 0, "above 0")
    for name, values in (("thresholds", thresholds), ("delta_b", delta_b), ("slack", slack)):
        _check(name, values, values >= 0, "at least 0")

    weighted = [weights[..., t, None] * d for t, d in enumerate(total_variation(mu, pi))]
    within = [(z <= thresholds[..., t, None] + ROUNDING).all(-1) for t, z in enumerate(weighted)]
    # P_m of every prefix that decides D_m, [..., V^(m-1)]: a prefix hands what it has spent to each of its continuations
    spent = accumulate(weighted, lambda p, z: p.repeat_interleave(mu.vocabulary, -1) + z)
    allowed = slack[..., None] + delta_b[..., None] * weights.cumsum(-1)
    kept = [(p <= allowed[..., m, None] + ROUNDING).all(-1) for m, p in zip(range(mu.horizon - 1), spent, strict=False)]
    bounds = suffix(thresholds / weights)
    profile = (bounds / weights)[..., :-1]
    ordered = (profile.diff(dim=-1) <= ROUNDING * profile[..., 1:]).all(-1)
    return ImprovementBound(
        surrogate=linear,
        penalty=prefix_penalty(bounds, weights, delta_b, slack, xi),
        thresholds_met=torch.stack(torch.broadcast_tensors(*within)).all(0),
        budget_met=torch.stack(torch.broadcast_tensors(torch.ones_like(linear, dtype=torch.bool), *kept)).all(0),
        order_met=ordered,
    )


def _check(name: str, values: Tensor, good: Tensor, right: str) -> None:
    if not bool(good.all()):
        raise ValueError(f"{name} must be {right}, got {values[~good].flatten()[0].item()}")
