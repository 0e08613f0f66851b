"""Bounds on the residual Delta from limits on the divergence, and their closed forms.  Shapes and units: the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


def suffix_sum(limits: Tensor) -> Tensor:
    """sum_{j>t} l_j ``[..., T]`` (Eq. 13): bounds the total variation of what follows t, by a union bound."""
    return pad(limits.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


def suffix_linear(limits: Tensor) -> Tensor:
    """l_max (T - t) ``[..., T]`` (Eq. 4): weaker than :func:`suffix_sum`, and what Theorem 1 is stated with."""
    horizon = limits.shape[-1]
    return limits.amax(-1, keepdim=True) * torch.arange(horizon - 1, -1, -1, dtype=limits.dtype, device=limits.device)


def suffix_product(limits: Tensor) -> Tensor:
    """beta_t = 1 - prod_{j>t} (1 - l_j) ``[..., T]`` (App. B.9): tighter than :func:`suffix_sum`, never above 1."""
    # l is a limit on a probability, so above 1 it says no more than 1
    return -suffix_sum((-limits.clamp(max=1)).log1p()).expm1()


def residual_bound(means: Tensor, suffix: Tensor, xi: float = 1.0) -> Tensor:
    """4 xi sum_{t<T} u_t suffix_t ``[...]``, no less than |Delta| when D_t <= l_t at every prefix (Prop. 4, Eq. 4 and 14).

    Args:
        means: u ``[..., T]`` from :func:`mean_divergence`.
        suffix: ``[..., T]`` from :func:`suffix_sum`, :func:`suffix_linear` (sum of lambda_t u_t) or :func:`suffix_product`.
        xi: bound on |R|.
    """
    return 4 * xi * (means * suffix).sum(-1)


def prefix_penalty(
    suffix: Tensor, weights: Tensor, delta_b: Tensor | float, slack: Tensor | float = 0.0, xi: float = 1.0
) -> Tensor:
    """Largest :func:`residual_bound` under a budget on every prefix: 4 xi (delta_b sum_t suffix_t + slack suffix_1 / w_1).

    By Abel summation (App. B.4), for any u >= 0 with sum_{j<=m} w_j u_j <= slack + delta_b W_m for all m < T, provided that
    suffix_t / w_t does not increase with t.  With :func:`suffix_linear` it is Theorem 1's penalty and Prop. 8's (Eq. 17).

    Args:
        suffix: ``[..., T]``, as in :func:`residual_bound`.
        weights: w ``[..., T]`` > 0.
        delta_b: budget per unit of weight, a number or ``[...]``.
        slack: allowed before the first token, a number or ``[...]``; the mask of Eq. 8 keeps to ``slack = delta``.
        xi: bound on |R|.
    """
    return 4 * xi * (delta_b * suffix.sum(-1) + slack * suffix[..., 0] / weights[..., 0])


def terminal_penalty(suffix: Tensor, weights: Tensor, total: Tensor | float, xi: float = 1.0) -> Tensor:
    """Largest :func:`residual_bound` when only one sum is limited, sum_t w_t u_t <= total: 4 xi total max_t suffix_t / w_t.

    All of it may be spent where it counts most (App. B.8).  At w = 1, with :func:`suffix_linear`, the paper's
    ``total = delta_b (T - 1)``, a budget over t < T, gives 2 - 2/T times :func:`prefix_penalty` (Eq. 18), and a mean over all
    T tokens as TRM-Avg takes it, ``total = delta_b T``, gives twice.

    Args:
        suffix, weights, xi: as in :func:`prefix_penalty`.
        total: a number or ``[...]``.
    """
    return 4 * xi * total * (suffix / weights).amax(-1)


def theorem_penalty(horizon: int, l_max: float, delta_b: float, xi: float = 1.0) -> float:
    """2 xi T (T - 1) l_max delta_b (Eq. 6): :func:`prefix_penalty` of :func:`suffix_linear`, in closed form for any T."""
    return 2 * xi * horizon * (horizon - 1) * l_max * delta_b


def uniform_penalty(horizon: int, delta: float, xi: float = 1.0) -> float:
    """2 xi T (T - 1) delta^2 (Sec. 3.2): D_t <= delta at every token and nothing else, as DPPO and TRM-Max ask."""
    return theorem_penalty(horizon, delta, delta, xi)


def cppo_penalty(horizon: int, delta: float, delta_b: float, xi: float = 1.0) -> float:
    """2 xi T (T - 1) delta delta_b (Eq. 15, Cor. 6): c_t = w_t delta; delta_b / delta times :func:`uniform_penalty`."""
    return theorem_penalty(horizon, delta, delta_b, xi)


def implemented_penalty(horizon: int, delta: float, delta_b: float, w_min: float, xi: float = 1.0) -> float:
    """2 xi T (T - 1) (delta / w_min) delta_b (Eq. 7 and 16, Cor. 7): c_t = delta, as implemented.

    It is delta_b / (delta w_min) times :func:`uniform_penalty`, hence smaller whenever delta_b < delta w_min.
    """
    return theorem_penalty(horizon, delta / w_min, delta_b, xi)


def slack_penalty(horizon: int, l_max: float, slack: float, w_1: float = 1.0, xi: float = 1.0) -> float:
    """slack 4 xi l_max (T - 1) / w_1 (Eq. 17, Prop. 8): what Eq. 8's initial ``slack = delta`` adds at most."""
    return 4 * xi * l_max * (horizon - 1) / w_1 * slack
