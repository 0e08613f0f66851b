"""Methods of a cell side by side: means over seeds, paired differences, and how far apart chance puts equal methods.

Shapes: S seeds, M methods, R shuffles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import numpy as np

from benchmarks.comparison.grid import Definitions
from benchmarks.comparison.outcomes import Outcome
from cppo_lightning.estimators import interval, resampled_means
from cppo_lightning.figures.numbers import Numbers

LEVEL = 0.95
_RESAMPLES = 20_000  # of five seeds the interval leaves out one in a thousand on each side
_SHUFFLES = 10_000

BySeed = Mapping[int, Outcome]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its bootstrap interval; of one seed, its value alone."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> Mean:
    """Of one value for each seed, with the expanded percentile interval."""
    if len(values) == 1:
        return Mean(values[0], values[0], values[0], 1)
    low, high = interval(resampled_means(values, resamples=_RESAMPLES), expanded(LEVEL, len(values)))
    return Mean(float(np.mean(values)), low, high, len(values))


@cache
def expanded(level: float, seeds: int) -> float:
    """The level at which a percentile interval over so few seeds is as wide as one of ``level`` should be.

    The bootstrap takes the spread of the seeds at hand for that of all seeds, which is too small by ``sqrt((n - 1) / n)``, and
    a normal tail for Student's: of five seeds, a plain 95 % interval misses in every sixth case.  The expanded percentile
    interval makes both good (Hesterberg 2015, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279).  Below five
    seeds it is their whole range, and still misses more often than it should: once in ``2^(n - 1)``.
    """
    # T = sqrt(n - 1) tan(angle), where the density of the angle is proportional to cos(angle)^(n - 2)
    angles = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    below = np.cumsum(np.cos(angles) ** (seeds - 2))
    student = math.sqrt(seeds - 1) * math.tan(angles[np.searchsorted(below, (1 + level) / 2 * below[-1])])
    tail = NormalDist().cdf(-math.sqrt(seeds / (seeds - 1)) * student)
    return min(1 - 2 * tail, math.nextafter(1, 0))


def paired(a: BySeed, b: BySeed, what: Literal["final", "best"] = "final") -> Mean | None:
    """The accuracy of ``a`` minus that of ``b``, over the seeds that both have; None if they have none."""
    found = [getattr(a[seed], what) - getattr(b[seed], what) for seed in a if seed in b]
    return mean_of(found) if found else None


@dataclass(frozen=True)
class Pair:
    """Two methods of a cell, over the seeds that both have: the first's final accuracy minus the second's."""

    first: str
    second: str
    difference: Mean
    excludes_zero: bool  # the interval, of enough seeds to say so
    beyond_chance: bool  # further apart than any two of as many equal methods would be


def pairs(methods: Mapping[str, BySeed], definitions: Definitions) -> list[Pair]:
    """Every pair of a cell's methods that has a seed in common."""
    seeds = sorted({seed for found in methods.values() for seed in found})
    finals = np.array([[found[seed].final if seed in found else np.nan for found in methods.values()] for seed in seeds])
    beyond = beyond_chance(finals)
    told = []
    for (i, first), (j, second) in combinations(enumerate(methods), 2):
        difference = paired(methods[first], methods[second])
        if difference is not None:
            sure = difference.excludes_zero and difference.seeds >= definitions.seeds
            told.append(Pair(first, second, difference, sure, bool(beyond[i, j])))
    return told


def beyond_chance(finals: Numbers, shuffles: int = _SHUFFLES) -> Numbers:
    """Which methods ``[M, M]`` (bool) lie further apart than the two furthest of M equal methods do in 95 % of cases.

    Were all equal, a seed's final accuracies could stand in any order, so each row of ``finals`` ``[S, M]`` is shuffled by
    itself: Tukey's range test by randomisation.  It accounts for the number of pairs, and for few seeds.  NaN stands for a run
    that is not there, and stays where it is; a pair's difference is over the seeds of both, times the square root of their
    number, so that pairs of few seeds, which chance puts further apart, are held to more.
    """
    generator = np.random.default_rng(0)
    there = np.isfinite(finals)
    tables = np.repeat(np.nan_to_num(finals)[None], shuffles + 1, axis=0)  # the first stays as it is
    for row, own in enumerate(there):
        tables[1:, row, own] = generator.permuted(tables[1:, row, own], axis=1)
    sums = tables.transpose(0, 2, 1) @ there.astype(float)  # [R + 1, M, M]: the first one's, over the seeds of both
    seeds = np.maximum(there.T.astype(float) @ there, 1)
    # what are equal sums may differ in their last bits
    gaps = np.round(np.abs(sums - sums.transpose(0, 2, 1)) / np.sqrt(seeds), 12)
    return gaps[0] > np.quantile(gaps.max((1, 2)), LEVEL, method="higher")


def separates(methods: Mapping[str, BySeed], definitions: Definitions) -> bool:
    """Whether two methods' final accuracies lie at least ``separation`` apart, mean over the seeds that both have."""
    sides = combinations(methods.values(), 2)
    gaps = [[a[seed].final - b[seed].final for seed in a if seed in b] for a, b in sides]
    return any(abs(float(np.mean(gap))) >= definitions.separation for gap in gaps if gap)
