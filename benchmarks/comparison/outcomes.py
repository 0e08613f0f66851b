"""What results come to, by the study's definitions: accuracies, collapses, stable learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.comparison.grid import Cell, Definitions, Run
from benchmarks.comparison.results import FINISHED, Result
from cppo_lightning.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """Accuracies of one run on held-out problems, between 0 and 1.

    ``initial``: at its first evaluation, ``best``: at any, ``final``: mean of the last ones, 0 if the run failed, ``failure``:
    why it did.
    """

    run: Run
    initial: float
    best: float
    final: float
    collapsed: bool
    failure: str | None


def outcome(result: Result, definitions: Definitions) -> Outcome:
    """By the study's definitions.

    Raises:
        ConfigError: a finished run has fewer evaluations than its final accuracy is the mean of.
    """
    found, last = result.evaluations, definitions.final_evaluations
    failure = None if result.status == FINISHED else result.status
    if len(found) < last + 1 and not failure:
        raise ConfigError(f"{result.run.name} has {len(found)} evaluations, and definitions.final_evaluations is {last}")
    initial = float(found[0]) if len(found) else 0.0
    final = 0.0 if failure else float(found[-last:].mean())
    collapsed = failure is not None or final < definitions.collapsed_below * initial
    return Outcome(result.run, initial, float(found.max(initial=0.0)), final, collapsed, failure)


Cells = Mapping[Cell, Mapping[str, Mapping[int, Outcome]]]  # -> method -> seed


def by_cell(outcomes: Sequence[Outcome]) -> Cells:
    """Outcomes by cell, method and seed, each in the order given."""
    cells: dict[Cell, dict[str, dict[int, Outcome]]] = {}
    for found in outcomes:
        cells.setdefault(found.run.cell, {}).setdefault(found.run.method, {})[found.run.seed] = found
    return cells


@dataclass(frozen=True)
class Stability:
    """One method's learning rates at one task and reuse, ascending.

    ``collapsed``: runs that did, and runs in all, by learning rate; ``largest``: the largest stable one, None if the lowest
    that was tried is not stable.
    """

    collapsed: Mapping[float, tuple[int, int]]
    largest: float | None

    @property
    def unbounded(self) -> bool:
        """Whether none that was tried is too large."""
        return self.largest == max(self.collapsed)


def stability(cells: Cells, definitions: Definitions) -> dict[tuple[str, int], dict[str, Stability]]:
    """By task and reuse, then method; only of methods that were tried at several learning rates there."""
    counts: dict[tuple[str, int], dict[str, dict[float, tuple[int, int]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.learning_rate):
        for method, outcomes in cells[cell].items():
            collapsed = sum(found.collapsed for found in outcomes.values())
            counts.setdefault((cell.task, cell.reuse), {}).setdefault(method, {})[cell.learning_rate] = collapsed, len(outcomes)
    return {
        place: {
            method: Stability(found, _largest_stable(found, definitions.stable_share))
            for method, found in methods.items()
            if len(found) > 1
        }
        for place, methods in counts.items()
    }


def _largest_stable(collapsed: Mapping[float, tuple[int, int]], most: float) -> float | None:
    largest = None
    for rate, (some, runs) in collapsed.items():
        if some > most * runs:
            break
        largest = rate
    return largest


def unpaired(results: Sequence[Result]) -> list[str]:
    """Names of the runs that began with other weights than their task's first, or another rollout than their seed's."""
    weights: dict[str, str] = {}
    rollouts: dict[tuple[str, int], str] = {}
    wrong = []
    for result in results:
        run = result.run
        same_weights = weights.setdefault(run.task, result.initial_weights) == result.initial_weights
        if not same_weights or rollouts.setdefault((run.task, run.seed), result.first_rollout) != result.first_rollout:
            wrong.append(run.name)
    return wrong
