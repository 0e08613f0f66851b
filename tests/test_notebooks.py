"""The notebooks run from top to bottom and show what they say."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from cppo_lightning.metrics import bin_names, mask_totals

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def drawn_nowhere() -> Iterator[None]:
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def execute(path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Run the code cells in one new module, as a kernel would in ``__main__``."""
    module = types.ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look their module up
    for number, cell in enumerate(cells(path), start=1):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    assert cells(path)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # matplotlib's use of tensors
@pytest.mark.usefixtures("drawn_nowhere")
def test_where_may_it_move(monkeypatch: pytest.MonkeyPatch) -> None:
    told = execute(NOTEBOOKS / "where_may_it_move.ipynb", monkeypatch)
    stats, bins = told.stats, told.BINS
    assert set(told.gates) == {"PPOClip", "CPPO", "DriftCap"}
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
