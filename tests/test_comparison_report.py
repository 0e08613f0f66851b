"""What the comparison says of results that are known: outcomes, pairs of methods, and the page."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.comparison.__main__ import PAGE, RESULTS
from benchmarks.comparison.cost import cost_of
from benchmarks.comparison.grid import STUDY, Cell, Run, load_study
from benchmarks.comparison.outcomes import by_cell, outcome, stability, unpaired
from benchmarks.comparison.pairs import LEVEL, beyond_chance, expanded, mean_of, paired, pairs, separates
from benchmarks.comparison.pictures import draw_accuracy, draw_budget, panels
from benchmarks.comparison.report import of_results, replaced, write_report
from benchmarks.comparison.results import Result, read
from benchmarks.comparison.tables import tables
from cppo_lightning.errors import ConfigError
from tests.known_study import COST, DECLARED, DEFINITIONS, SMALL, outcomes, result_of, save, table_of

PROBES = RESULTS.parent / "probes"
CELL = Cell("chain", 1e-4, 2)


class TestOutcomes:
    def test_by_hand(self) -> None:
        run = Run("chain", "cppo", 1e-4, 2, 1)
        found = outcome(result_of(run, [0.6, nan, 0.9, 0.2, nan, 0.3]), DEFINITIONS)
        assert (found.initial, found.best, found.final, found.collapsed) == (0.6, 0.9, 0.25, True)
        assert not outcome(result_of(run, [0.6, 0.3, 0.3]), DEFINITIONS).collapsed  # half of it is not below half
        with pytest.raises(ConfigError, match="has 2 evaluations"):
            outcome(result_of(run, [0.6, 0.3]), DEFINITIONS)
        failed = outcome(result_of(run, [0.6, 0.8], "not finite"), DEFINITIONS)
        assert (failed.final, failed.best, failed.collapsed, failed.failure) == (0.0, 0.8, True, "not finite")

    def test_learning_rates_that_are_stable(self) -> None:
        finals = {
            1e-5: {"a": [0.9] * 5, "b": [0.1, 0.9], "c": [0.9], "d": [0.9]},
            1e-4: {"a": [0.9] * 4 + [0.1], "b": [0.9, 0.9], "d": [0.9]},  # a fifth of a's collapses
            1e-3: {"a": [0.9] * 3 + [0.1] * 2, "b": [0.9, 0.9], "d": [0.9]},
            1e-2: {"a": [0.9] * 5, "b": [0.9, 0.9]},
        }
        # whatever the order in which they ran
        cells = by_cell([found for rate in (1e-4, 1e-2, 1e-5, 1e-3) for found in outcomes(finals[rate], rate)])
        found = stability(cells, DEFINITIONS)["chain", 2]
        assert {name: method.largest for name, method in found.items()} == {"a": 1e-4, "b": None, "d": 1e-3}
        assert found["a"].collapsed == {1e-5: (0, 5), 1e-4: (1, 5), 1e-3: (2, 5), 1e-2: (0, 5)}
        assert [found[name].unbounded for name in "abd"] == [False, False, True]

    def test_runs_that_are_not_paired_are_found(self) -> None:
        a, b, c = (result_of(Run("chain", *run), [0.6]) for run in (("a", 1e-4, 2, 1), ("b", 1e-4, 2, 1), ("a", 1e-4, 2, 2)))
        assert unpaired([a, b, c]) == []
        assert unpaired([a, Result(b.run, b.status, b.initial_weights, "other", b.curves), c]) == [b.run.name]
        # another seed has other samples, but not other weights
        assert unpaired([a, b, Result(c.run, c.status, "other", c.first_rollout, c.curves)]) == [c.run.name]


class TestPairs:
    def test_paired_differences_by_hand(self) -> None:
        """Over the seeds of both; of two seeds the interval is their range."""
        methods = by_cell(outcomes({"a": [0.9, 0.5, 0.1], "b": [0.6, 0.4]}))[CELL]
        found = paired(methods["a"], methods["b"])
        assert found is not None
        assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
        assert found.seeds == 2
        assert paired({1: methods["a"][1]}, {2: methods["b"][2]}) is None
        alone = mean_of([0.4])
        assert (alone.mean, alone.low, alone.high, alone.seeds) == (0.4, 0.4, 0.4, 1)

    def test_the_level_of_few_seeds_is_students(self) -> None:
        """Against 97.5 % quantiles of Student's t from a printed table."""
        for seeds, student in ((2, 12.7062), (5, 2.7764), (8, 2.3646), (30, 2.0452)):
            tail = NormalDist().cdf(-student * (seeds / (seeds - 1)) ** 0.5)
            assert (1 - expanded(LEVEL, seeds)) / 2 == pytest.approx(tail, rel=2e-3, abs=1e-15)
        assert expanded(LEVEL, 1000) == pytest.approx(LEVEL, abs=1e-3)

    def test_intervals_over_five_seeds_miss_seldom(self) -> None:
        """Where plain percentile intervals at 95 % miss in one case of six."""
        values = np.random.default_rng(0).normal(size=(200, 5))
        assert 0.04 < np.mean([mean_of(row.tolist()).excludes_zero for row in values]) < 0.12

    def test_an_interval_of_few_seeds_says_nothing(self) -> None:
        """Four differences of one sign, of which equal methods have one in eight cases; five are enough to say it."""
        for seeds, says in ((1, False), (4, False), (5, True)):
            methods = by_cell(outcomes({"a": [0.9, 0.8, 0.9, 0.8, 0.9][:seeds], "b": [0.5, 0.6, 0.5, 0.5, 0.5][:seeds]}))[CELL]
            assert [pair.excludes_zero for pair in pairs(methods, DEFINITIONS)] == [says]

    def test_of_two_methods_and_five_seeds_by_hand(self) -> None:
        """All five of one sign: of 32 orders two are as far apart, more than one in twenty; of six seeds two of 64."""
        for seeds, beyond in ((1, False), (5, False), (6, True)):
            finals = np.array([[0.9, 0.5], [0.8, 0.6], [0.9, 0.7], [0.8, 0.5], [0.9, 0.5], [0.7, 0.5]])[:seeds]
            assert beyond_chance(finals).tolist() == [[False, beyond], [beyond, False]]

    def test_equal_methods_are_seldom_told_apart_and_others_always(self) -> None:
        """Of 100 cells of six equal methods and five seeds about 5 have a pair beyond chance, also where runs are not there."""
        rng = np.random.default_rng(0)
        cells = rng.uniform(0.3, 0.9, (100, 5, 6))
        for there in (1.0, 0.75):
            some = np.where(rng.random(cells.shape) < there, cells, nan)
            assert 1 <= sum(beyond_chance(finals, 500).any() for finals in some) < 12
        cells[:, :, 0] = 0.05
        assert all(beyond_chance(finals, 500)[0, 1:].any() for finals in cells[:10])

    def test_a_pair_without_a_common_seed_is_not_told_apart(self) -> None:
        """Each beside the third over seven seeds: of 128 orders two are as far apart, in either pair, so 4 in 128."""
        finals = np.full((14, 3), nan)
        finals[:7, 0], finals[7:, 1], finals[:, 2] = 0.9, 0.1, 0.5
        assert beyond_chance(finals).tolist() == [[False, False, True], [False, False, True], [True, True, False]]

    def test_every_pair_of_a_cell(self) -> None:
        rng = np.random.default_rng(0)
        good = {name: rng.uniform(0.7, 0.9, 8).tolist() for name in "abc"}
        methods = by_cell(outcomes({**good, "bad": [0.1] * 5}))[CELL]
        found = {(pair.first, pair.second): pair for pair in pairs(methods, DEFINITIONS)}
        assert {pair for pair, told in found.items() if told.beyond_chance} == {(name, "bad") for name in "abc"}
        assert len(found) == 6
        assert (found["a", "b"].difference.seeds, found["a", "bad"].difference.seeds) == (8, 5)

    def test_separation_is_over_common_seeds(self) -> None:
        close, apart = (by_cell(outcomes({"a": [0.5, 0.7, 0.1], "b": b}))[CELL] for b in ([0.6, 0.69], [0.75, 0.66]))
        assert not separates(close, DEFINITIONS)
        assert separates(apart, DEFINITIONS)
        assert not separates({"a": apart["a"]}, DEFINITIONS)


class TestReport:
    @pytest.mark.parametrize(
        ("study", "results", "page"),
        [
            (STUDY, RESULTS, PAGE),
            (PROBES / "probes.yaml", PROBES / "results.parquet", PAGE.with_stem("comparison-probes")),
        ],
        ids=["study", "probes"],
    )
    def test_the_page_is_of_the_committed_results(self, study: Path, results: Path, page: Path) -> None:
        text = page.read_text()
        for name, part in of_results(load_study(study), read(results), cost_of(results)).items():
            assert replaced(text, name, part) == text, name

    def test_tables_by_hand(self, tmp_path: Path) -> None:
        study = load_study(save(SMALL, tmp_path))
        parts = tables(study, by_cell(outcomes({"grpo": [0.2, 0.4], "cppo": [0.7, 0.8]}, 1e-2)), COST)
        assert parts["cost"].startswith("All 4 declared runs are in: 2.0 core hours, 1.0 hours on 2 cores, of a machine.")
        difference = "-0.450 [-0.500, -0.400] | -0.150 [-0.200, -0.100]"
        assert f"| grpo | 2 | 0.300 [0.200, 0.400] | 0.600 [0.600, 0.600] | 1 of 2 | {difference} |" in parts["cells"]
        assert "Starts at 0.600; separates the methods, with fewer than the 5 seeds that it should have." in parts["cells"]
        assert "Pairs: 1; of fewer than 5 seeds, which get no star: 1." in parts["pairs"]
        assert "| 1 cppo | +0.45 |\n| 2 grpo |  |" in parts["pairs"]
        assert parts["stable"] == "No method has run at several learning rates."

    def test_pairs_are_marked_by_hand(self, tmp_path: Path) -> None:
        """Six seeds of one sign: the interval excludes zero, and of two methods' 64 orders two are as far apart."""
        blocks = [{**SMALL["blocks"][0], "seeds": [1, 2, 3, 4, 5, 6], "learning_rates": [1e-2, 1e-3]}]
        study = load_study(save({**SMALL, "blocks": blocks}, tmp_path))
        finals = {"grpo": [0.2, 0.2, 0.2, 0.2, 0.2, 0.4], "cppo": [0.7, 0.8, 0.7, 0.8, 0.7, 0.7]}
        parts = tables(study, by_cell([*outcomes(finals, 1e-2), *outcomes({"cppo": [0.7]}, 1e-3)]), COST)
        assert "| 1 cppo | +0.50\\*† |" in parts["pairs"]
        assert "| collapsed runs | 0.001 | 0.01 | largest stable learning rate |" in parts["stable"]
        assert "| cppo | 0 of 1 | 0 of 6 | 0.01, the largest tried |" in parts["stable"]
        assert "| cppo | 1 of 6 | 0.700 | 0.700 | 0 of 1 |" in parts["cells"]

    def test_a_part_of_the_grid_says_which(self, tmp_path: Path) -> None:
        """Two of four runs; a run that failed says why."""
        study = load_study(save(SMALL, tmp_path))
        results = read(table_of(DECLARED[:3], tmp_path))
        results[0] = result_of(results[0].run, [0.6], "not finite")
        parts = of_results(study, results, COST)
        assert parts["cost"].startswith("3 of 4 declared runs are in (75%): ")
        assert "| chain, learning rate 0.01, reuse 2 | 3 of 4 | 1 of 2 |" in parts["cost"]
        assert "| cppo | 1 of 2 |" in parts["cells"]
        assert "grpo failed with seed 1: not finite." in parts["cells"]

    def test_the_page_keeps_what_is_outside_its_markers(self) -> None:
        begin, end = (f"<!-- made by python -m benchmarks.comparison report: cost{edge} -->" for edge in ("", ", end"))
        page = f"before\n{begin}\nold\n{end}\nafter\n"
        assert replaced(page, "cost", "new \\1") == f"before\n{begin}\n\nnew \\1\n\n{end}\nafter\n"
        with pytest.raises(ConfigError, match="no place for cells"):
            replaced(page, "cells", "new")

    def test_a_page_that_cannot_be_renewed_gets_no_pictures(self, tmp_path: Path) -> None:
        study, results = load_study(save(SMALL, tmp_path)), table_of(DECLARED, tmp_path)
        (tmp_path / "page.md").write_text("# Nothing to renew\n")
        with pytest.raises(ConfigError, match="the page has no place for cost"):
            write_report(study, results, tmp_path / "page.md")
        with pytest.raises(ConfigError, match=r"--page '.*none/page\.md': '.*none' is no folder"):
            write_report(study, results, tmp_path / "none" / "page.md")
        assert not list(tmp_path.glob("*.png"))

    def test_a_budget_is_seen_beside_one_that_is_overspent(self) -> None:
        """Each panel of the budget has an axis of its own, with numbers; those of accuracies share one."""
        results = [result_of(Run("chain", method, 1e-4, 2, 1), [0.6, 0.8]) for method in ("cppo", "cppo_kl")]
        spent = [
            {**result.curves, "budget/spent_mean": np.full(2, most)} for result, most in zip(results, (0.3, 20.0), strict=True)
        ]
        results = [replace(result, curves=curves) for result, curves in zip(results, spent, strict=True)]
        numbers = panels(results, [CELL])
        budget = draw_budget(numbers)
        assert budget is not None
        tops = [axes.get_ylim()[1] for axes in budget.axes]
        assert 0.3 < tops[0] < 0.4
        assert 20 < tops[1] < 22
        assert all(axes.yaxis.get_tick_params()["labelleft"] for axes in budget.axes)
        labelled = [axes.yaxis.get_tick_params()["labelleft"] for axes in draw_accuracy(numbers, "cppo").axes]
        assert labelled == [True, False]

    def test_runs_that_are_not_declared_are_refused(self, tmp_path: Path) -> None:
        study, strange = load_study(save(SMALL, tmp_path)), Run("chain", "cppo", 1e-2, 2, 3)
        with pytest.raises(ConfigError, match="has 1 runs that --study does not declare, the first of them chain/cppo"):
            write_report(study, table_of([*DECLARED, strange], tmp_path), tmp_path / "page.md")
        (tmp_path / "results.json").unlink()
        with pytest.raises(ConfigError, match=r"needs the \.json"):
            cost_of(tmp_path / "results.parquet")
