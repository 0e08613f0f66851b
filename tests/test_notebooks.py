"""The notebooks run from top to bottom and show what they say, and what is stored in them is what they print and draw."""

from __future__ import annotations

import re
import sys
import tempfile
import types
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from cppo_lightning.metrics import bin_names, mask_totals
from cppo_lightning.theory import improvement_bound
from cppo_lightning.trust_regions import CPPO, DPPO
from docs.run_notebooks import NOTEBOOKS, code_cells, execute

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # matplotlib's use of tensors


@pytest.fixture(autouse=True)
def temporary_folders_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def execute_all(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[types.ModuleType, list[list[dict[str, Any]]]]:
    """The module in which the notebook's cells have run, and the outputs of each."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    return module, list(execute(NOTEBOOKS / f"{name}.ipynb", module))


def texts(outputs: list[list[dict[str, Any]]]) -> list[str]:
    return ["".join(output["text"]) for cell in outputs for output in cell if output["output_type"] == "stream"]


def pictures(outputs: list[list[dict[str, Any]]]) -> list[np.ndarray]:
    found = [output["data"]["image/png"] for cell in outputs for output in cell if output["output_type"] == "display_data"]
    return [imread(BytesIO(b64decode(picture))) for picture in found]


def assert_as_stored(name: str, outputs: list[list[dict[str, Any]]]) -> None:
    """Pictures are compared by pixels with some room, since fonts are drawn a little differently by other versions."""
    stored = [cell["outputs"] for cell in code_cells(NOTEBOOKS / f"{name}.ipynb")]
    assert texts(stored) == texts(outputs)
    assert len(pictures(stored)) == len(pictures(outputs))
    for there, drawn in zip(pictures(stored), pictures(outputs), strict=True):
        assert there.shape == drawn.shape
        assert np.mean(np.abs(there - drawn).max(-1) > 0.3) < 0.002


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_as_run_once_from_the_top(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    stored = [cell["outputs"] for cell in cells]
    assert len(texts(stored)) > 1
    assert len(pictures(stored)) > 0
    assert path.stat().st_size < 250_000
    assert not {"Error", "Traceback"} & {word for text in texts(stored) for word in text.split()}
    assert not re.search(r"/(home|root|tmp|Users)/", " ".join(texts(stored)))


def test_where_may_it_move(monkeypatch: pytest.MonkeyPatch) -> None:
    told, outputs = execute_all("where_may_it_move", monkeypatch)
    assert_as_stored("where_may_it_move", outputs)
    stats, bins = told.stats, told.BINS
    for gate in told.gates.values():
        # the curves are those that MaskRate would log
        expected = mask_totals(stats, gate, bins)
        means = [float(expected[f"mask/rate_at/{n}"][0] / expected[f"mask/rate_at/{n}"][1]) for n in bin_names(bins)]
        shown = told.share_dropped(gate, told.by_position)
        torch.testing.assert_close(shown, torch.tensor(means), rtol=0, atol=1e-6)
        assert 0 < shown.mean() < 1
    # the clip drops mostly unlikely tokens, CPPO does not
    half = bins // 2
    unlikely, likely = told.share_dropped(told.gates["PPOClip"], told.by_probability).split(half)
    assert unlikely.mean() > 2 * likely.mean()
    unlikely, likely = told.share_dropped(told.gates["CPPO"], told.by_probability).split(half)
    assert unlikely.mean() < 1.5 * likely.mean()
    # a larger budget drops fewer tokens
    assert told.rates == sorted(told.rates, reverse=True)
    assert told.rates[0] > told.rates[-1]


def test_trust_regions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    told, outputs = execute_all("trust_regions_by_hand", monkeypatch)
    assert_as_stored("trust_regions_by_hand", outputs)
    assert {name: gate.keep[0].tolist() for name, gate in told.gates.items()} == told.by_hand
    torch.testing.assert_close(told.found["threshold"][0], torch.tensor(told.c), rtol=0, atol=1e-6)
    dropped = {name: [t for t, kept in enumerate(keeps, start=1) if not kept] for name, keeps in told.by_hand.items()}
    assert dropped == {"PPO clip": [2], "DPPO": [3, 10], "CPPO": [3, 4, 5]}
    assert told.found["masked_by_position"][0].nonzero().flatten().tolist() == [2]
    # what it says at the end: no purse and no weight is DPPO
    as_dppo = CPPO(told.BinaryTV(), delta_b=1.0, w_min=1.0, adaptive=False)(told.stats)
    assert torch.equal(as_dppo.keep, DPPO(told.BinaryTV())(told.stats).keep)


def test_the_bound_on_a_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    told, outputs = execute_all("the_bound_on_a_toy", monkeypatch)
    assert_as_stored("the_bound_on_a_toy", outputs)
    assert (told.missed <= told.allowed).all()
    # the budget breaks at smaller steps than the threshold, and the bound holds while neither has
    steps = [0.02 * n for n in range(1, 60)]
    found = [
        improvement_bound(told.mu, told.leaning(step), told.rewards, told.weights, told.thresholds, told.cppo.delta_b)
        for step in steps
    ]
    by_budget = sum(bool(bound.budget_met) for bound in found)
    by_threshold = sum(bool(bound.thresholds_met) for bound in found)
    assert 0 < by_budget < by_threshold < len(steps)
    for step, bound in zip(steps[:by_budget], found, strict=False):
        gain = told.expected_reward(told.leaning(step), told.rewards) - told.expected_reward(told.mu, told.rewards)
        assert bound.premises_hold
        assert gain >= bound.value


@pytest.mark.slow
def test_your_own_trust_region(monkeypatch: pytest.MonkeyPatch) -> None:
    told, outputs = execute_all("your_own_trust_region", monkeypatch)
    assert "padding changes nothing: True" in texts(outputs)[0]
    assert told.gate.keep.tolist() == [[True, False, True, False]]
    regions = told.found.regions
    assert list(regions) == ["as recorded", "PPOClip", "DPPO", "CPPO"]
    assert all(0 < numbers.dropped < 0.9 for numbers in regions.values())
    # what it says of the picture: prefixes matter to two of them
    for name in ("as recorded", "CPPO"):
        assert regions[name].kept_at[0] > np.mean(regions[name].kept_at[5:])
    # the recording is of the notebook's own class: asked again, it decides the same
    again = told.replay(told.recording_of(told.folder / "debug" / "version_0"), [told.folder / "drift_cap.yaml"])
    assert again.comparison.regions["drift_cap"].unlike_the_run == 0
    assert len(pictures(outputs)) == 2


@pytest.mark.slow
def test_reading_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told, outputs = execute_all("reading_a_run", monkeypatch)
    assert set(told.entries) == set(told.scalars)
    # the first update of a rollout drops nothing, and later ones do
    starts = {event.step for event in told.scalars["rollout/reward"]}
    rates = [(event.step in starts, event.value) for event in told.scalars["mask/rate"]]
    assert all(rate == 0 for first, rate in rates if first)
    assert max(rate for first, rate in rates if not first) > 0
    # the evaluation's rows give back what was logged
    assert len(told.files) == len(told.scalars["eval/sums/avg@4"]) == 3
    assert told.by_problem.mean() == pytest.approx(told.scalars["eval/sums/avg@4"][-1].value, abs=1e-6)
    assert "*response*" in told.text
    assert len(pictures(outputs)) == 2
