"""The comparison of trust regions: its grid, its sweep, and what its report says of results that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from benchmarks.comparison.__main__ import RESULTS
from benchmarks.comparison.grid import REPOSITORY, Cell, Definitions, Run, load_study
from benchmarks.comparison.one_run import settings
from benchmarks.comparison.outcomes import (
    Outcome,
    by_cell,
    chance_range,
    outcome,
    paired,
    pairs,
    separates,
    stable_learning_rates,
    unpaired,
)
from benchmarks.comparison.recorder import RunRecorder
from benchmarks.comparison.report import replaced, tables, write_report
from benchmarks.comparison.results import EVALUATION, FINISHED, TAGS, Result, assemble, difference, read, write_run
from cppo_lightning.errors import ConfigError, RolloutError
from tests.sweep_rig import results as results_in

DEFINITIONS = Definitions(2, collapsed_below=0.5, stable_share=0.2, separation=0.1, seeds=5, reference="cppo")
SMALL: dict[str, Any] = {
    "tasks": {"chain": {"config": "configs/chain/chain_16.yaml", "model": ["not.made"], "core_seconds": 1}},
    "methods": {"grpo": {"preset": "grpo"}, "cppo": {"preset": "cppo", "overrides": {"delta": 0.2}}},
    "definitions": vars(DEFINITIONS) | {"final_evaluations": 1},
    "blocks": [{"tasks": ["chain"], "methods": ["grpo", "cppo"], "learning_rates": [1e-2], "reuses": [2], "seeds": [1, 2]}],
}


def save(study: Mapping[str, Any], folder: Path) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def two_rollouts(folder: Path) -> Path:
    """The chain's config, of a size for tests; a digit and a comma are right, which an untrained model writes now and then."""
    config = OmegaConf.load(REPOSITORY / "configs" / "chain" / "chain_16.yaml")
    config.trainer.max_epochs = 2
    config.data.plan.update(prompts=8, updates=2)
    config.data.prompts.init_args.count = 64
    config.data.evaluation.prompts.init_args.count = 16
    config.data.verifier = {"class_path": "cppo_lightning.verifiers.Format", "init_args": {"pattern": "[0-9],"}}
    OmegaConf.save(config, folder / "two_rollouts.yaml")
    return folder / "two_rollouts.yaml"


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one sweep that was left alone and of one that was killed and started again."""
    from cppo_lightning.chain_model import chain_model, chain_tokenizer

    folder = tmp_path_factory.mktemp("sweeps")
    study = {**SMALL, "tasks": {"chain": {**SMALL["tasks"]["chain"], "config": str(two_rollouts(folder))}}}
    tokenizer = chain_tokenizer()
    for saved in (tokenizer, chain_model(tokenizer, 16)):
        saved.save_pretrained(folder / "models" / "chain")
    command = [sys.executable, "-m", "tests.sweep_rig", str(folder), str(save(study, folder))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    logs = [log.read_text() for log in folder.rglob("log.txt")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    return folder


@pytest.mark.slow
class TestSweep:
    def test_a_kill_changes_no_byte(self, sweeps: Path) -> None:
        alone, killed = (sweeps / name / "results.parquet" for name in ("alone", "killed"))
        assert alone.read_bytes() == killed.read_bytes()

    def test_what_had_a_result_was_not_run_again(self, sweeps: Path) -> None:
        before, after = json.loads((sweeps / "before.json").read_text()), results_in(sweeps / "killed")
        assert 1 <= len(before) < len(after) == 4
        assert before.items() <= after.items()

    def test_methods_begin_with_the_same_weights_and_samples(self, sweeps: Path) -> None:
        results = read(sweeps / "alone" / "results.parquet")
        grpo, cppo = ({r.run.seed: r for r in results if r.run.method == method} for method in ("grpo", "cppo"))
        assert unpaired(results) == []
        for seed in (1, 2):
            assert grpo[seed].first_rollout == cppo[seed].first_rollout
            assert grpo[seed].evaluations[0] == cppo[seed].evaluations[0]
            assert str(difference(grpo[seed], cppo[seed])).startswith("from rollout 1 on: ")  # they are different methods
        assert grpo[1].initial_weights == grpo[2].initial_weights
        assert grpo[1].first_rollout != grpo[2].first_rollout

    def test_rows_are_rollouts(self, sweeps: Path) -> None:
        results = read(sweeps / "alone" / "results.parquet")
        assert [result.run for result in results] == load_study(sweeps / "study.yaml").runs()
        for result in results:
            assert result.status == FINISHED
            assert np.isfinite(result.curves[EVALUATION]).tolist() == [True, False, True]
            assert np.isfinite(result.curves["rollout/accuracy"]).tolist() == [True, True, False]
            assert result.curves["train/steps"][0] == 4
            assert np.isfinite(result.curves["budget/spent_mean"][0]) == (result.run.method == "cppo")

    def test_the_report_is_of_these_results(self, sweeps: Path, tmp_path: Path) -> None:
        (tmp_path / "comparison.md").write_text((REPOSITORY / "docs" / "comparison.md").read_text())
        written = write_report(load_study(sweeps / "study.yaml"), sweeps / "alone" / "results.parquet", tmp_path)
        page = (tmp_path / "comparison.md").read_text()
        assert "### Chain, learning rate 0.01, reuse 2" in page
        assert "4 runs" in page
        assert [file.name for file in written] == [
            "comparison.md",
            *(f"comparison-chain-{n}.png" for n in ("accuracy", "masks", "budget")),
        ]
        assert all(file.read_bytes()[:4] == b"\x89PNG" for file in written[1:])

    def test_results_are_equal_or_said_where_not(self, sweeps: Path) -> None:
        first, other, *_ = read(sweeps / "alone" / "results.parquet")
        assert difference(first, first) is None
        assert difference(first, other) == "began with other first rollout"
        curve = first.curves["train/entropy"].copy()
        curve[1] = np.nextafter(np.float32(curve[1]), np.float32(np.inf))
        changed = Result(
            first.run, first.status, first.initial_weights, first.first_rollout, {**first.curves, "train/entropy": curve}
        )
        assert str(difference(first, changed)).startswith("from rollout 2 on: train/entropy is")


def test_a_run_that_fails_is_a_result(tmp_path: Path) -> None:
    file, run = tmp_path / "run" / "result.parquet", Run("chain", "none", 1e-3, 1, 1)
    recorder = RunRecorder(str(file))
    recorder.rows[0] |= {EVALUATION: 0.5}

    class Trainer:
        default_root_dir = str(tmp_path)

    recorder.on_exception(Trainer(), None, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not file.exists()
    recorder.on_exception(Trainer(), None, RolloutError(f"not finite; {tmp_path}/nonfinite has it"))  # type: ignore[arg-type]
    assemble([run], [file], tmp_path / "results.parquet")
    (result,) = read(tmp_path / "results.parquet")
    assert result.status == "not finite; ./nonfinite has it"
    assert outcome(result, DEFINITIONS) == Outcome(run, initial=0.5, best=0.5, final=0.0, collapsed=True, failed=True)


class TestGrid:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s["blocks"][0].update(methods=["cpo"]),
                "blocks[0].methods: 'cpo' is not one of grpo, cppo; did you mean cppo?",
            ),
            (
                lambda s: s["blocks"][0].update(tasks=["chains"]),
                "blocks[0].tasks: 'chains' is not one of chain; did you mean chain?",
            ),
            (
                lambda s: s["blocks"][0].update(seeds=[1, 1]),
                "blocks[0].seeds must list something, and nothing twice, got [1, 1]",
            ),
            (lambda s: s["blocks"][0].update(seeds=[]), "blocks[0].seeds must list something"),
            (lambda s: s["blocks"][0].update(learning_rates=[0.0]), "blocks[0].learning_rates must be above 0, got 0.0"),
            (lambda s: s["blocks"][0].update(reuse=[1]), "reuse"),
            (lambda s: s["methods"]["cppo"].update(preset="cpo"), "methods.cppo.preset: 'cpo' is not one of"),
            (lambda s: s["methods"]["cppo"].update(overrides={"delta": -1}), "methods.cppo: CPPO.delta must be above 0"),
            (lambda s: s["methods"]["cppo"].update(overrides={"dleta": 1}), "dleta"),
            (lambda s: s["tasks"]["chain"].update(config="configs/chains.yaml"), "tasks.chain.config: 'configs/chains.yaml'"),
            (lambda s: s["definitions"].update(reference="dppo"), "definitions.reference: 'dppo' is not one of"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
        study = json.loads(json.dumps(SMALL))
        change(study)
        with pytest.raises(ConfigError) as error:
            load_study(save(study, tmp_path))
        assert message in str(error.value)

    def test_runs_are_the_blocks_products_each_once(self, tmp_path: Path) -> None:
        blocks = [SMALL["blocks"][0], {**SMALL["blocks"][0], "methods": ["cppo"], "seeds": [2, 3]}]
        study = load_study(save({**SMALL, "blocks": blocks}, tmp_path))
        assert [(run.method, run.seed) for run in study.runs()] == [
            ("grpo", 1),
            ("grpo", 2),
            ("cppo", 1),
            ("cppo", 2),
            ("cppo", 3),
        ]
        assert [run.seed for run in study.chosen(method=["cppo"], seed=None)] == [1, 2, 3]
        with pytest.raises(ConfigError, match="--seed: 4 is not one of"):
            study.chosen(seed=[4])
        with pytest.raises(ConfigError, match="no run of the grid"):
            study.chosen(method=["grpo"], seed=[3])

    def test_methods_of_a_seed_differ_in_the_trust_region_alone(self, tmp_path: Path) -> None:
        study = load_study(save(SMALL, tmp_path))
        grpo, cppo = (settings(study, Run("chain", method, 1e-3, 2, 7), tmp_path) for method in ("grpo", "cppo"))
        assert grpo["model"].pop("trust_region") != cppo["model"].pop("trust_region")
        assert grpo == cppo

    def test_the_study_is_the_papers_and_fits_its_time(self) -> None:
        study = load_study()
        table = {"none", "ppo", "grpo", "cispo", "minpro", "dppo", "trm_max", "trm_avg", "cppo"}
        assert {method.preset for method in study.methods.values()} >= table
        assert {run.method for run in study.runs()} == set(study.methods)
        # six hours on two cores
        assert sum(study.tasks[run.task].core_seconds for run in study.runs()) <= 6 * 3600 * 2


def results_of(run: Run, evaluations: Sequence[float], status: str = FINISHED) -> Result:
    nothing = np.full(len(evaluations), np.nan)
    return Result(run, status, "w", f"seed {run.seed}", {**dict.fromkeys(TAGS, nothing), EVALUATION: np.array(evaluations)})


def outcomes(finals: Mapping[str, Sequence[float]], rate: float = 1e-4) -> list[Outcome]:
    """One for each seed, all from 0.6."""
    runs = [
        (Run("chain", method, rate, 2, seed), final) for method, found in finals.items() for seed, final in enumerate(found, 1)
    ]
    return [outcome(results_of(run, [0.6, final, final]), DEFINITIONS) for run, final in runs]


class TestOutcomes:
    def test_by_hand(self) -> None:
        run = Run("chain", "cppo", 1e-4, 2, 1)
        found = outcome(results_of(run, [0.6, np.nan, 0.9, 0.2, np.nan, 0.3]), DEFINITIONS)
        assert (found.initial, found.best, found.final, found.collapsed) == (0.6, 0.9, 0.25, True)
        assert not outcome(results_of(run, [0.6, 0.3, 0.3]), DEFINITIONS).collapsed  # half of it is not below half
        with pytest.raises(ConfigError, match="has 2 evaluations"):
            outcome(results_of(run, [0.6, 0.3]), DEFINITIONS)

    def test_paired_differences_by_hand(self) -> None:
        """Of two seeds a quarter of the resamples are the one alone and a quarter the other: the interval is their range."""
        methods = by_cell(outcomes({"a": [0.9, 0.5, 0.1], "b": [0.6, 0.4]}))[Cell("chain", 1e-4, 2)]
        found = paired(methods["a"], methods["b"])
        assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
        assert found.seeds == 2
        assert found.excludes_zero
        assert not paired(methods["b"], methods["b"]).excludes_zero

    def test_equal_methods_are_seldom_told_apart_and_others_always(self) -> None:
        """Of 100 cells of six equal methods and five seeds about 5 have a pair beyond chance."""
        rng = np.random.default_rng(0)
        cells = rng.uniform(0.3, 0.9, (100, 5, 6))
        beyond = [np.ptp(finals.mean(0)) > chance_range(finals, 500) for finals in cells]
        assert 1 <= sum(beyond) < 12
        cells[:, :, 0] = 0.05
        assert all(np.ptp(finals.mean(0)) > chance_range(finals, 500) for finals in cells[:10])
        # two methods and one seed: in either order they are as far apart
        assert chance_range(np.array([[0.2, 0.9]])) == pytest.approx(0.7)

    def test_every_pair_of_a_cell(self) -> None:
        rng = np.random.default_rng(0)
        good = {name: rng.uniform(0.7, 0.9, 8).tolist() for name in "abc"}
        methods = by_cell(outcomes({**good, "bad": [0.1] * 5}))[Cell("chain", 1e-4, 2)]
        found = {(pair.first, pair.second): pair for pair in pairs(methods)}
        assert {pair for pair, told in found.items() if told.beyond_chance} == {(name, "bad") for name in "abc"}
        assert len(found) == 6
        assert (found["a", "b"].difference.seeds, found["a", "bad"].difference.seeds) == (8, 5)

    def test_separation(self) -> None:
        close, apart = (by_cell(outcomes({"a": [0.5, 0.7], "b": b})) for b in ([0.6, 0.69], [0.75, 0.66]))
        assert not any(separates(methods, DEFINITIONS) for methods in close.values())
        assert all(separates(methods, DEFINITIONS) for methods in apart.values())

    def test_stable_learning_rates(self) -> None:
        finals = {
            1e-5: {"a": [0.9] * 5, "b": [0.1, 0.9], "c": [0.9]},
            1e-4: {"a": [0.9] * 4 + [0.1], "b": [0.9, 0.9]},  # a fifth of a's collapses
            1e-3: {"a": [0.9] * 3 + [0.1] * 2, "b": [0.9, 0.9]},
            1e-2: {"a": [0.9] * 5, "b": [0.9, 0.9]},
        }
        cells = by_cell([found for rate, methods in finals.items() for found in outcomes(methods, rate)])
        assert stable_learning_rates(cells, DEFINITIONS) == {("chain", 2): {"a": 1e-4, "b": None}}

    def test_runs_that_are_not_paired_are_found(self) -> None:
        a, b = (results_of(Run("chain", method, 1e-4, 2, 1), [0.6]) for method in "ab")
        assert unpaired([a, b]) == []
        assert unpaired([a, Result(b.run, b.status, b.initial_weights, "other", b.curves)]) == [b.run.name]


class TestReport:
    @pytest.mark.skipif(not RESULTS.exists(), reason="the study's results are not committed")
    def test_the_page_is_of_the_committed_results(self) -> None:
        study, results = load_study(), read(RESULTS)
        cells = by_cell([outcome(result, study.definitions) for result in results])
        page = (REPOSITORY / "docs" / "comparison.md").read_text()
        for name, part in tables(study, cells, json.loads(RESULTS.with_suffix(".json").read_text())).items():
            assert replaced(page, name, part) == page, name

    def test_tables_by_hand(self, tmp_path: Path) -> None:
        study = load_study(save(SMALL, tmp_path))
        cells = by_cell(outcomes({"grpo": [0.2, 0.4], "cppo": [0.7, 0.8]}))
        cost = {"runs": 4, "core_seconds": 7200.0, "seconds": 3600.0, "cores": 2, "machine": "a machine"}
        parts = tables(study, cells, cost)  # type: ignore[arg-type]
        assert parts["cost"] == "4 runs, 2.0 core hours, 1.0 hours on 2 cores: a machine."
        assert "| grpo | 2 | 0.300 [0.200, 0.400] | 0.600 [0.600, 0.600] | 1 of 2 | -0.450 [-0.500, -0.400] |" in parts["cells"]
        assert "Starts at 0.600; separates the methods, with fewer than the 5 seeds that it should have." in parts["cells"]
        assert "1 pairs. The interval of 1 excludes zero" in parts["pairs"]
        assert "| cppo | +0.45\\* |" in parts["pairs"]

    def test_the_page_keeps_what_is_outside_its_markers(self) -> None:
        begin, end = (f"<!-- made by python -m benchmarks.comparison report: cost{edge} -->" for edge in ("", ", end"))
        page = f"before\n{begin}\nold\n{end}\nafter\n"
        assert replaced(page, "cost", "new \\1") == f"before\n{begin}\n\nnew \\1\n\n{end}\nafter\n"
        with pytest.raises(ConfigError, match="no place for cells"):
            replaced(page, "cells", "new")

    def test_results_that_lack_a_run_are_refused(self, tmp_path: Path) -> None:
        study, run = load_study(save(SMALL, tmp_path)), Run("chain", "cppo", 1e-2, 2, 1)
        write_run(tmp_path / "run" / "result.parquet", {"status": FINISHED}, {0: {EVALUATION: 0.5}})
        assemble([run], [tmp_path / "run" / "result.parquet"], tmp_path / "results.parquet")
        with pytest.raises(ConfigError, match="lacks 3 runs of the study, the first of them chain/cppo"):
            write_report(study, tmp_path / "results.parquet", tmp_path)
