"""The debug config with all that is there for speed alone, and without any of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cppo_lightning.cli import main
from tests import fast_paths
from tests.callback_rig import scalars
from tests.rank_rig import on_ranks

REPOSITORY = Path(__file__).parents[1]
# float32 sums in another order; every difference met was below 1e-6
TOLERANCE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
CLOCKS = ("_per_second", "/seconds_")
# at a rollout's first update all ratios are 1, and only rounding says on which side
ROUNDING = "mask/toward"


@dataclass(frozen=True)
class Run:
    taken: set[str]
    scalars: dict[str, list[tuple[int, float]]]  # tag -> step and value


def run(model: Path, folder: Path) -> Run:
    """``fit`` of configs/debug.yaml: two rollouts of two updates, within bounds that they reach."""
    with fast_paths.taken() as taken:
        main(
            [
                *("fit", "--config", str(REPOSITORY / "configs" / "debug.yaml"), "--trainer.max_epochs", "2"),
                *("--model.policy.path", str(model), "--trainer.logger.init_args.version", "run"),
                *("--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", ""),
                *("--model.trust_region.init_args.delta", "0.03"),
            ]
        )
    return Run(taken, scalars(folder))


@pytest.fixture(scope="module")
def as_it_comes(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tiny_model_path, tmp_path_factory.mktemp("as_it_comes"))


def test_all_are_taken_or_none(as_it_comes: Run, request: pytest.FixtureRequest) -> None:
    """With ``--without-fast-paths`` that none is; else that what looks for them sees each."""
    assert as_it_comes.taken == (set() if request.config.getoption("without_fast_paths") else fast_paths.HERE)


def test_ranks_are_told(request: pytest.FixtureRequest) -> None:
    assert on_ranks(1, fast_paths.are_off) == [request.config.getoption("without_fast_paths")]


def test_no_number_depends_on_them(
    as_it_comes: Run, tiny_model_path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Everything that the two runs log, over four updates that build on each other and rollouts drawn from their weights."""
    if request.config.getoption("without_fast_paths"):
        pytest.skip("both would be without them")
    with pytest.MonkeyPatch.context() as patch:
        fast_paths.turn_off(patch)
        slow = run(tiny_model_path, tmp_path)
    assert slow.taken == set()
    assert slow.scalars.keys() == as_it_comes.scalars.keys()
    tags = {tag for tag in slow.scalars if tag != ROUNDING and not any(clock in tag for clock in CLOCKS)}
    assert {"train/loss", "train/grad_norm", "train/entropy", "mismatch/logp_gap_mean"} <= tags
    assert any(0.1 < rate < 0.9 for _, rate in slow.scalars["mask/rate"])
    for tag in tags:
        assert slow.scalars[tag] == [(step, pytest.approx(v, **TOLERANCE)) for step, v in as_it_comes.scalars[tag]], tag
