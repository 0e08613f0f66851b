"""What the pictures of a trust region are drawn of.

Positions count a response's trainable tokens from 1.  NaN stands for "no token was there".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """What D_t is."""

    name: str
    unit: str


class Cause(IntEnum):
    """What a trust region did with a token, and why."""

    KEPT = 0
    TOWARD = 1  # kept, and moves pi back to mu
    BY_POSITION = 2  # its own weighted divergence is above the threshold
    BY_BUDGET = 3  # the prefix before it has spent what was allowed
    REJECTED = 4  # dropped with its whole response
    DROPPED = 5  # for a reason that the trust region does not tell


@dataclass(frozen=True)
class DivergenceByPosition:
    """Divergence and the threshold on it along the responses (arXiv 2606.10968, Fig. 2), in N bins of positions."""

    edges: Numbers  # [N + 1] half a token before each bin, and after the last
    mean: Numbers  # [N]
    largest_tenth: Numbers  # [N] mean over the tenth of the bin's tokens that has the largest D_t
    limit: Numbers | None  # [N] mean of delta / w_t; None without such a threshold
    measure: Measure
    note: str


@dataclass(frozen=True)
class ThresholdWindow:
    """Consecutive tokens of one response and what became of them (Fig. 3), n tokens."""

    position: Numbers  # [n]
    divergence: Numbers  # [n] D_t
    cause: NDArray[np.int64]  # [n] of Cause
    limit: Numbers | None  # [n] delta / w_t
    effective: Numbers | None  # [n] c_t / w_t, what of it the prefix has left; below 0 when overspent
    spent: Numbers | None  # [n] S_t, weighted divergence of the prefix up to t
    allowed: Numbers | None  # [n] delta + delta_b W_{t-1}, what S_t may be
    measure: Measure
    note: str


@dataclass(frozen=True)
class BudgetOverSteps:
    """The prefix budget over a run (Fig. 7), R rows of one or several rollouts."""

    step: Numbers  # [R] optimizer steps at each row's end
    delta_b: Numbers  # [R] mean over responses
    by_budget: Numbers  # [R] dropped tokens that the budget dropped, as a share of all dropped ones
    unit: str  # of the divergence
    note: str


@dataclass(frozen=True)
class MaskHeatMap:
    """Share of tokens dropped, by position and by step: R rows of one or several rollouts, N bins of positions."""

    steps: Numbers  # [R + 1] optimizer steps at each row's beginning, and at the last one's end
    edges: Numbers  # [N + 1] half a token before each bin, and after the last
    rate: Numbers  # [R, N] between 0 and 1
    note: str


@dataclass(frozen=True)
class FirstExhaustion:
    """Where responses first ran out of prefix budget, in E equal slices of their own length."""

    counts: Numbers  # [E] responses
    responses: int  # in all, those whose budget lasted included
    note: str


@dataclass(frozen=True)
class RegionsByPosition:
    """One share for each of R trust regions, in N equal slices of the responses' own length."""

    names: tuple[str, ...]  # R
    shares: Numbers  # [R, N] between 0 and 1
    note: str


@dataclass(frozen=True)
class RegionsAgreement:
    """How alike R trust regions decide on the same tokens."""

    names: tuple[str, ...]  # R
    alike: Numbers  # [R, R] share of the tokens that both keep or both drop
    dropped: Numbers  # [R, R] share of the tokens that the row's region drops which the column's drops too
    note: str
