"""What results come to, by the study's definitions: accuracies, collapses, paired differences and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.comparison.grid import Cell, Definitions, Run
from benchmarks.comparison.results import FINISHED, Result
from cppo_lightning.errors import ConfigError
from cppo_lightning.estimators import RESAMPLES, interval, resampled_means
from cppo_lightning.figures.numbers import Numbers

LEVEL = 0.95


@dataclass(frozen=True)
class Outcome:
    """Accuracies of one run on held-out problems, between 0 and 1.

    ``initial``: at its first evaluation, ``best``: at any, ``final``: mean of the last ones, 0 if the run failed.
    """

    run: Run
    initial: float
    best: float
    final: float
    collapsed: bool
    failed: bool


def outcome(result: Result, definitions: Definitions) -> Outcome:
    """By the study's definitions.

    Raises:
        ConfigError: a finished run has fewer evaluations than its final accuracy is the mean of.
    """
    found, last = result.evaluations, definitions.final_evaluations
    failed = result.status != FINISHED
    if len(found) < last + 1 and not failed:
        raise ConfigError(f"{result.run.name} has {len(found)} evaluations, and definitions.final_evaluations is {last}")
    initial = float(found[0]) if len(found) else 0.0
    final = 0.0 if failed else float(found[-last:].mean())
    collapsed = failed or final < definitions.collapsed_below * initial
    return Outcome(result.run, initial, float(found.max(initial=0.0)), final, collapsed, failed)


Cells = Mapping[Cell, Mapping[str, Mapping[int, Outcome]]]  # -> method -> seed


def by_cell(outcomes: Sequence[Outcome]) -> Cells:
    """Outcomes by cell, method and seed, each in the order given."""
    cells: dict[Cell, dict[str, dict[int, Outcome]]] = {}
    for found in outcomes:
        cells.setdefault(found.run.cell, {}).setdefault(found.run.method, {})[found.run.seed] = found
    return cells


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its bootstrap percentile interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> Mean:
    """Over ``values``, one of each seed."""
    low, high = interval(resampled_means(values), LEVEL)
    return Mean(float(np.mean(values)), low, high, len(values))


def paired(a: Mapping[int, Outcome], b: Mapping[int, Outcome]) -> Mean:
    """The final accuracy of ``a`` minus that of ``b``, over the seeds that both have.

    Raises:
        ConfigError: they have none in common.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        methods = [next(iter(side.values())).run.method for side in (a, b)]
        raise ConfigError(f"{' and '.join(methods)} have no seed in common; give them the same seeds")
    return mean_of([a[seed].final - b[seed].final for seed in seeds])


@dataclass(frozen=True)
class Pair:
    """Two methods of a cell: the first's final accuracy minus the second's."""

    first: str
    second: str
    difference: Mean
    beyond_chance: bool  # further apart than the extremes of all methods would be by chance


def pairs(methods: Mapping[str, Mapping[int, Outcome]]) -> list[Pair]:
    """Every pair of a cell's methods."""
    shared = [seed for seed in next(iter(methods.values())) if all(seed in found for found in methods.values())]
    finals = {name: [found[seed].final for seed in shared] for name, found in methods.items()}
    chance = chance_range(np.array(list(finals.values())).T)
    return [
        Pair(a, b, paired(methods[a], methods[b]), bool(abs(np.mean(finals[a]) - np.mean(finals[b])) > chance))
        for a, b in combinations(methods, 2)
    ]


def chance_range(finals: Numbers, resamples: int = RESAMPLES) -> float:
    """How far apart the best and the worst of M methods' means are at most, in all but 5 % of cases, if all are equal.

    Were they equal, a seed's final accuracies could stand in any order, so each row of ``finals`` ``[S, M]`` is shuffled by
    itself: Tukey's range by randomisation.  It accounts for the number of pairs, and for few seeds, as bootstrap intervals do
    not.  Infinite without a seed.
    """
    if not finals.size:
        return float("inf")
    generator = np.random.default_rng(0)
    means = np.stack([generator.permuted(finals, axis=1).mean(0) for _ in range(resamples)])  # [resamples, M]
    return float(np.quantile(np.ptp(means, axis=1), LEVEL, method="higher"))


def final_mean(outcomes: Mapping[int, Outcome]) -> float:
    return float(np.mean([found.final for found in outcomes.values()]))


def separates(methods: Mapping[str, Mapping[int, Outcome]], definitions: Definitions) -> bool:
    """Whether the methods' mean final accuracies lie at least ``separation`` apart."""
    means = [final_mean(outcomes) for outcomes in methods.values()]
    return max(means) - min(means) >= definitions.separation


def stable_learning_rates(cells: Cells, definitions: Definitions) -> dict[tuple[str, int], dict[str, float | None]]:
    """The largest stable learning rate of each method, by task and reuse; None where the lowest that was tried is not stable.

    Only where a method was tried at several learning rates.
    """
    shares: dict[tuple[str, int], dict[str, dict[float, float]]] = {}
    for cell, methods in cells.items():
        for method, outcomes in methods.items():
            share = float(np.mean([found.collapsed for found in outcomes.values()]))
            shares.setdefault((cell.task, cell.reuse), {}).setdefault(method, {})[cell.learning_rate] = share
    return {
        place: {name: _largest_stable(found, definitions.stable_share) for name, found in methods.items() if len(found) > 1}
        for place, methods in shares.items()
    }


def _largest_stable(shares: Mapping[float, float], most: float) -> float | None:
    largest = None
    for rate in sorted(shares):
        if shares[rate] > most:
            break
        largest = rate
    return largest


def unpaired(results: Sequence[Result]) -> list[str]:
    """Names of the runs that did not begin with the same weights and rollout as the first of their task and seed."""
    firsts: dict[tuple[str, int], Result] = {}
    wrong = []
    for result in results:
        first = firsts.setdefault((result.run.task, result.run.seed), result)
        if (first.initial_weights, first.first_rollout) != (result.initial_weights, result.first_rollout):
            wrong.append(result.run.name)
    return wrong
