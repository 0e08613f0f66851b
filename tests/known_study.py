"""A small study and results of known accuracies, for the tests of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.comparison.cost import Cost
from benchmarks.comparison.grid import Definitions, Run
from benchmarks.comparison.outcomes import Outcome, outcome
from benchmarks.comparison.results import EVALUATION, FINISHED, TAGS, Part, Result, assemble, write_run

DEFINITIONS = Definitions(2, collapsed_below=0.5, stable_share=0.2, separation=0.1, seeds=5, reference="cppo")
SMALL: dict[str, Any] = {
    "tasks": {"chain": {"config": "configs/chain/chain_16.yaml", "model": ["not.made"], "core_seconds": 1, "rollouts": 2}},
    "methods": {"grpo": {"preset": "grpo"}, "cppo": {"preset": "cppo", "overrides": {"delta": 0.2}}},
    "definitions": vars(DEFINITIONS) | {"final_evaluations": 1},
    "blocks": [{"tasks": ["chain"], "methods": ["grpo", "cppo"], "learning_rates": [1e-2], "reuses": [2], "seeds": [1, 2]}],
}
DECLARED = [Run("chain", method, 1e-2, 2, seed) for seed in (1, 2) for method in ("grpo", "cppo")]

COST = Cost("a machine", cores=2, models={"chain": 200.0}, runs={run.name: 1750.0 for run in DECLARED})


def save(study: Mapping[str, Any], folder: Path) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def result_of(run: Run, evaluations: Sequence[float], status: str = FINISHED) -> Result:
    nothing = np.full(len(evaluations), np.nan)
    return Result(run, status, "w", f"seed {run.seed}", {**dict.fromkeys(TAGS, nothing), EVALUATION: np.array(evaluations)})


def outcomes(finals: Mapping[str, Sequence[float]], rate: float = 1e-4) -> list[Outcome]:
    """One for each seed, all from 0.6."""
    runs = [
        (Run("chain", method, rate, 2, seed), final) for method, found in finals.items() for seed, final in enumerate(found, 1)
    ]
    return [outcome(result_of(run, [0.6, final, final]), DEFINITIONS) for run, final in runs]


def table_of(runs: Sequence[Run], folder: Path, made_of: str = "all") -> Path:
    """A results.parquet that has these runs, each from 0.6 to 0.8, and what they took."""
    files = [folder / run.name / "result.parquet" for run in runs]
    for run, file in zip(runs, files, strict=True):
        told = {"status": FINISHED, "initial_weights": "w", "first_rollout": f"seed {run.seed}"}
        write_run(file, told, {0: {EVALUATION: 0.6}, 1: {EVALUATION: 0.8}})
    assemble([Part.load(run, made_of, file) for run, file in zip(runs, files, strict=True)], folder / "results.parquet")
    COST.save(folder / "results.parquet")
    return folder / "results.parquet"
