"""Pictures of the trust region: sums against a slow count over tokens, and what is drawn read back from the figure."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from PIL import Image

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import TrustRegionFigures, run_pictures
from cppo_lightning.callbacks.run_pictures import (
    divergence_by_position,
    history_row,
    measure_of,
    of_rollout,
    of_run,
    threshold_window,
)
from cppo_lightning.divergences import BinaryKL, BinaryTV, TopKTV
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError
from cppo_lightning.figures import style
from cppo_lightning.figures.budget_over_steps import draw_budget_over_steps
from cppo_lightning.figures.divergence_by_position import draw_divergence_by_position
from cppo_lightning.figures.first_exhaustion import draw_first_exhaustion
from cppo_lightning.figures.mask_heat_map import draw_mask_heat_map
from cppo_lightning.figures.numbers import (
    BudgetOverSteps,
    Cause,
    DivergenceByPosition,
    FirstExhaustion,
    MaskHeatMap,
    Measure,
    Numbers,
    ThresholdWindow,
)
from cppo_lightning.figures.threshold_window import draw_threshold_window
from cppo_lightning.figures.validation import Curve, validation_curves
from cppo_lightning.history import SumHistory
from cppo_lightning.positions import (
    LEVELS,
    RESOLUTION,
    SLICES,
    PositionBins,
    PositionSums,
    TokenWindow,
    causes,
    largest_tenth,
)
from cppo_lightning.rollout.stream import RolloutPlan
from cppo_lightning.trust_regions import CISPO, CPPO, DPPO, GSPO, TRM, Intersection, PPOClip, SoftCPPO, TrustRegion
from tests.callback_rig import UPDATES, Data, Module, events, stats_and_gate, trainer
from tests.rank_rig import on_ranks
from tests.test_callbacks import OUTCOMES

BUDGETED = CPPO(BinaryTV(), delta_b=0.01)
REGIONS = {
    "cppo": BUDGETED,
    "soft": SoftCPPO(BinaryTV(), delta_b=0.01),
    "no_budget": CPPO(BinaryTV(), delta_b=None),
    "dppo": DPPO(BinaryTV(), delta=0.1),
    "trm_max": TRM("max", 0.3, BinaryKL()),
    "trm_avg": TRM("mean", 0.02, BinaryKL()),
    "gspo": GSPO(0.05, 0.05),
    "ppo": PPOClip(),
    "cispo": CISPO(),
    "both": Intersection([PPOClip(), DPPO(BinaryTV(), delta=0.1)]),
}
every_region = pytest.mark.parametrize("region", REGIONS.values(), ids=list(REGIONS))
MEASURE = Measure("total variation", "probability")


def some_stats(seed: int, responses: int = 12, longest: int = 40) -> TokenStats:
    """Responses of 0 to ``longest`` tokens, some with holes, garbage where masked; some tokens with pi = mu."""
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (responses,), generator=made)
    lengths[:2] = torch.tensor([longest, 0])
    mask = torch.arange(longest) < lengths[:, None]
    mask &= (torch.rand(responses, longest, generator=made) < 0.9) | (torch.arange(responses)[:, None] % 2 == 0)
    mu = 0.02 + 0.9 * torch.rand(responses, longest, generator=made)
    moved = (mu * torch.exp(0.25 * torch.randn(responses, longest, generator=made))).clamp(max=0.99)
    pi = torch.where(torch.rand(responses, longest, generator=made) < 0.2, mu, moved)
    advantages = torch.randn(responses, 1, generator=made).expand(responses, longest)
    garbage = torch.full_like(mu, -3.0)
    return TokenStats(
        torch.zeros(responses, longest, dtype=torch.long), torch.where(mask, pi.log(), garbage), mu.log(), advantages, mask
    )


def part(stats: TokenStats, chosen: list[int]) -> TokenStats:
    i = torch.tensor(chosen)
    return TokenStats(stats.response_ids[i], stats.logp[i], stats.rollout_logp[i], stats.advantages[i], stats.mask[i])


def summed(region: TrustRegion, parts: list[TokenStats], bins: PositionBins) -> PositionSums:
    sums = PositionSums(bins)
    for stats in parts:
        sums.add(stats, region(stats), region.token_threshold)
    return sums


# ---- sums -----------------------------------------------------------------------------------------------------------------


@every_region
@pytest.mark.parametrize("bins", [PositionBins(1, 40), PositionBins(7, 4)], ids=["each", "beyond_the_last"])
def test_sums_by_position_against_a_count_over_tokens(region: TrustRegion, bins: PositionBins) -> None:
    stats = some_stats(1)
    gate = region(stats)
    weight = gate.diagnostics.get("token_weight", torch.ones_like(stats.logp))
    divergence = gate.diagnostics.get("divergence", (stats.logp.exp() - stats.rollout_logp.exp()).abs())
    values: list[list[float]] = [[] for _ in range(bins.count)]
    limits, dropped = np.zeros(bins.count), np.zeros(bins.count)
    exhausted, by_budget = np.zeros(SLICES), 0
    for b, own in enumerate(stats.mask):
        for place, t in enumerate(own.nonzero().flatten().tolist()):
            n = min(place // bins.width, bins.count - 1)
            values[n].append(float(divergence[b, t]))
            limits[n] += 0 if region.token_threshold is None else region.token_threshold / float(weight[b, t])
            dropped[n] += not bool(gate.keep[b, t])
            by_budget += "masked_by_budget" in gate.diagnostics and bool(gate.diagnostics["masked_by_budget"][b, t])
        if "first_exhausted" in gate.diagnostics and own.any() and (first := int(gate.diagnostics["first_exhausted"][b])) >= 0:
            exhausted[SLICES * first // int(own.sum())] += 1

    sums = summed(region, [stats], bins)
    counts = np.array([len(v) for v in values])
    np.testing.assert_array_equal(sums.tokens.sum(-1), counts)
    np.testing.assert_allclose(sums.divergence.sum(-1), [sum(v) for v in values], rtol=1e-6)
    np.testing.assert_allclose(sums.limit, limits, rtol=1e-6)
    np.testing.assert_array_equal(sums.dropped, dropped)
    np.testing.assert_array_equal(sums.exhausted, exhausted)
    assert int(sums.by_budget) == by_budget
    assert int(sums.responses) == int(stats.mask.any(-1).sum())
    exact = [np.sort(v)[-math.ceil(len(v) / 10) :].mean() if v else math.nan for v in values]
    np.testing.assert_allclose(largest_tenth(sums.tokens, sums.divergence), exact, rtol=RESOLUTION, atol=2**-20)


def test_the_largest_tenth_is_exact_where_levels_are_taken_whole_and_within_its_resolution_elsewhere() -> None:
    made = np.random.default_rng(0)
    values = np.exp(made.normal(-6, 2, 5000)).clip(0, 30)
    stats = TokenStats(*[torch.zeros(1, 5000)] * 4, torch.ones(1, 5000, dtype=torch.bool))  # type: ignore[arg-type]
    sums = PositionSums(PositionBins(5000, 1))
    sums.add(stats, Gate(stats.logp, stats.mask, {"divergence": torch.tensor(values[None]).float()}), None)
    assert sums.tokens.shape == (1, LEVELS)
    assert float(largest_tenth(sums.tokens, sums.divergence)) == pytest.approx(np.sort(values)[-500:].mean(), rel=1e-3)
    one_level_each = torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 50.0]])
    assert float(largest_tenth(*one_level_each)) == 50.0


@every_region
def test_micro_batches_padding_and_blank_rows_change_no_sum(region: TrustRegion) -> None:
    stats, bins = some_stats(2), PositionBins(3, 14)
    whole = summed(region, [stats], bins).flat
    cut = summed(
        region, [part(stats, [3, 5, 1]), part(stats, [0, 2, 4, 6, 7, 8]), part(stats, [11, 10, 9]), part(stats, [1])], bins
    )
    torch.testing.assert_close(cut.flat, whole, rtol=1e-12, atol=1e-12)
    wide = TokenStats(
        *[torch.nn.functional.pad(getattr(stats, name), (0, 9)) for name in vars(stats) if getattr(stats, name) is not None]
    )
    torch.testing.assert_close(summed(region, [wide], bins).flat, whole, rtol=1e-6, atol=0)


def test_sums_of_other_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        PositionSums(PositionBins(1, 3), PositionSums(PositionBins(1, 4)).flat)


@pytest.mark.parametrize(
    ("longest", "at_most", "expected"), [(24, 64, (1, 24)), (8192, 64, (128, 64)), (100, 64, (2, 50)), (1, 1, (1, 1))]
)
def test_positions_have_a_bin_each_where_they_fit(longest: int, at_most: int, expected: tuple[int, int]) -> None:
    bins = PositionBins.up_to(longest, at_most)
    assert (bins.width, bins.count) == expected
    assert bins.width * bins.count >= longest
    assert int(bins.index(torch.ones(1, longest, dtype=torch.bool)).max()) == bins.count - 1


@every_region
def test_a_token_above_the_threshold_that_moves_away_is_dropped(region: TrustRegion) -> None:
    stats = some_stats(3)
    gate = region(stats)
    if region.token_threshold is None:
        assert "token_weight" not in gate.diagnostics
        return
    weight = gate.diagnostics.get("token_weight", torch.ones_like(stats.logp))
    above = stats.mask & ~gate.diagnostics["toward"] & (weight * gate.diagnostics["divergence"] > region.token_threshold)
    assert above.any()
    assert not gate.keep[above].any()


def test_what_cppo_says_of_its_budget_is_equation_8() -> None:
    stats = some_stats(4)
    found = BUDGETED(stats).diagnostics
    weighted = found["token_weight"] * found["divergence"]
    before = weighted.cumsum(-1) - weighted
    expected = (found["budget_allowed"] - before).clamp(max=BUDGETED.delta)
    torch.testing.assert_close(found["threshold"][stats.mask], expected[stats.mask], rtol=0, atol=2e-6)
    first = found["budget_allowed"][stats.mask & (stats.mask.cumsum(-1) == 1)]
    torch.testing.assert_close(first, torch.full_like(first, BUDGETED.delta))


def with_logp(stats: TokenStats, value: float) -> TokenStats:
    """One token of the first response gets this log pi."""
    logp = stats.logp.clone()
    logp[0, 3] = value
    return replace(stats, logp=logp)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_without_a_finite_divergence_counts_as_one_that_did_not_move(value: float) -> None:
    stats, bins = some_stats(10), PositionBins(1, 40)
    still = with_logp(stats, float(stats.rollout_logp[0, 3]))
    gate = PPOClip()(still)  # no divergence of its own
    distance = BinaryTV()(still)
    distance[0, 3] = value
    own = Gate(gate.weight, gate.keep, {**gate.diagnostics, "divergence": distance})
    sums = [PositionSums(bins) for _ in range(3)]
    for into, seen, answer in zip(sums, (still, with_logp(stats, value), still), (gate, gate, own), strict=True):
        into.add(seen, answer, None)
        torch.testing.assert_close(into.flat, sums[0].flat, rtol=0, atol=0)
        window = TokenWindow.of(seen, answer, None, 16)
        torch.testing.assert_close(window.values, TokenWindow.of(still, gate, None, 16).values, rtol=0, atol=0, equal_nan=True)


def test_a_budget_that_is_not_finite_is_left_out() -> None:
    stats = some_stats(10)
    stats.logp[0] = math.nan
    gate = BUDGETED(stats)
    budgets = gate.diagnostics["delta_b"][stats.mask.any(-1)]
    assert budgets.isfinite().tolist() == [False] + [True] * (len(budgets) - 1)
    sums = summed(BUDGETED, [stats], PositionBins(1, 40))
    assert int(sums.budgets) == len(budgets) - 1
    assert float(sums.delta_b) == pytest.approx(float(budgets[1:].sum()))
    assert sums.flat.isfinite().all()


# ---- the window -----------------------------------------------------------------------------------------------------------


@every_region
@pytest.mark.parametrize("width", [6, 60])
def test_the_window_is_the_one_that_dropped_most(region: TrustRegion, width: int) -> None:
    stats = some_stats(5)
    gate = region(stats)
    dropped = stats.mask & ~gate.keep
    divergence = gate.diagnostics.get("divergence", BinaryTV()(stats)).double()
    counts = {
        (b, t): (int(dropped[b, t : t + width].sum()), round(float(divergence[b, t : t + width].sum()), 4))
        for b in range(len(dropped))
        for t in range(max(1, dropped.shape[1] - width + 1))
    }
    window = TokenWindow.empty(width)
    for chosen in ([0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11], [1]):  # the last has no token
        cut = part(stats, chosen)
        window |= TokenWindow.of(cut, region(cut), region.token_threshold, width)
    found = window.rows()
    assert (int((found["cause"] >= Cause.BY_POSITION).sum()), round(float(found["divergence"].sum()), 4)) == max(
        counts.values()
    )
    places = [(b, slice(t, t + width)) for (b, t), count in counts.items() if count == max(counts.values())]
    position = (stats.mask.cumsum(-1) * stats.mask).double()
    assert any(  # windows over the same tokens are equally good
        torch.equal(position[b, t][stats.mask[b, t]], found["position"])
        and torch.equal(divergence[b, t][stats.mask[b, t]], found["divergence"])
        for b, t in places
    )


def test_the_windows_thresholds_and_budget() -> None:
    stats = part(some_stats(6), [0])
    gate = BUDGETED(stats)
    found, own = TokenWindow.of(stats, gate, BUDGETED.token_threshold, 64).rows(), stats.mask[0]
    weight = gate.diagnostics["token_weight"][0, own].double()
    torch.testing.assert_close(found["limit"], BUDGETED.delta / weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["effective"], gate.diagnostics["threshold"][0, own] / weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["spent"], (weight * found["divergence"]).cumsum(-1), rtol=1e-5, atol=0)
    over = found["spent"] > found["allowed"]
    away = found["cause"] != Cause.TOWARD
    dropped = (found["cause"] == Cause.BY_BUDGET) | (found["cause"] == Cause.BY_POSITION)
    assert torch.equal(dropped, away & (over | (found["divergence"] > found["limit"])))
    assert dropped.any()
    assert found["length"].unique().tolist() == [int(own.sum())]


SHOWN_OF = {
    "effective": {"budget_allowed", "threshold", "token_weight"},
    "spent": {"budget_allowed", "weighted_divergence"},
    "allowed": {"budget_allowed"},
}
TOLD = ("budget_allowed", "threshold", "token_weight", "weighted_divergence")


@pytest.mark.parametrize("told", [c for n in range(5) for c in itertools.combinations(TOLD, n)], ids="+".join)
def test_a_trust_region_may_tell_a_part_of_what_the_window_shows(told: tuple[str, ...]) -> None:
    stats = part(some_stats(6), [0])
    whole = BUDGETED(stats)
    kept = {name: value for name, value in whole.diagnostics.items() if name in told or name not in TOLD}
    window = TokenWindow.of(stats, Gate(whole.weight, whole.keep, kept), BUDGETED.delta, 64)
    found, expected = window.rows(), TokenWindow.of(stats, whole, BUDGETED.delta, 64).rows()
    for name, needs in SHOWN_OF.items():
        if needs <= set(told):
            assert torch.equal(found[name], expected[name])
        else:
            assert found[name].isnan().all()
    draw_threshold_window(threshold_window(window, MEASURE, "n"))


def test_causes_by_hand() -> None:
    stats, gate = stats_and_gate()
    found = torch.where(stats.mask, causes(stats, gate), -1).tolist()
    toward, kept, position, budget = Cause.TOWARD, Cause.KEPT, Cause.BY_POSITION, Cause.BY_BUDGET
    assert found[:2] == [[toward, kept, position, kept, budget], [toward, -1, budget, -1, -1]]
    bare = Gate(gate.weight, gate.keep, {"rejected": torch.tensor([False, True, True])})
    assert causes(stats, bare)[0].tolist() == [0, 0, Cause.DROPPED, 0, Cause.DROPPED]
    assert causes(stats, bare)[1, 2] == Cause.REJECTED


# ---- the run's past -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollouts", [1, 7, 8, 9, 100])
def test_the_history_loses_nothing_and_stays_small(rollouts: int) -> None:
    history = SumHistory(8)
    for i in range(rollouts):
        history.add(3 * i, 3 * i + 3, torch.tensor([1.0, float(i)]).double())
        assert len(history) <= 8
    assert history.table().sum(0).tolist() == [rollouts, rollouts * (rollouts - 1) / 2]
    assert history.starts[0] == 0
    assert history.starts[1:] == history.ends[:-1]
    assert history.ends[-1] == 3 * rollouts
    assert history.table()[:-1, 0].tolist() == [history.per_row] * (len(history) - 1)
    assert history.table()[-1, 0] == history.in_last


@pytest.mark.parametrize("stop", [2, 3, 7, 8, 9, 15, 24])
def test_a_history_that_goes_on_in_fewer_rows_is_one_that_never_had_more(stop: int) -> None:
    larger, smaller, resumed = SumHistory(8), SumHistory(2), SumHistory(2)

    def rollouts(history: SumHistory, numbers: range) -> None:
        for i in numbers:
            history.add(3 * i, 3 * i + 3, torch.tensor([1.0, float(i)]).double())

    rollouts(larger, range(stop))
    resumed.load_state_dict(larger.state_dict())
    for history, numbers in ((resumed, range(stop, stop + 9)), (smaller, range(stop + 9))):
        rollouts(history, numbers)
    torch.testing.assert_close(resumed.state_dict(), smaller.state_dict(), rtol=0, atol=0)


def test_an_odd_history_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        SumHistory(5)


# ---- pictures -------------------------------------------------------------------------------------------------------------

NAN = math.nan


def spread(first: float, last: float, count: int) -> Numbers:
    return np.linspace(first, last, count).astype(np.float64)


PROFILE = DivergenceByPosition(
    np.array([0.5, 2.5, 4.5, 6.5]),
    np.array([0.1, 0.02, NAN]),
    np.array([0.3, 0.2, NAN]),
    np.array([0.15, 0.18, NAN]),
    MEASURE,
    "n",
)
WINDOW = ThresholdWindow(
    position=spread(3, 8, 6),
    divergence=np.array([0.01, 0.02, 0.3, 0.04, 0.05, 0.06]),
    cause=np.arange(6),
    limit=spread(0.15, 0.18, 6),
    effective=spread(0.15, -0.2, 6),
    spent=spread(0.0, 0.5, 6),
    allowed=spread(0.15, 0.3, 6),
    measure=MEASURE,
    note="n",
)
BUDGET = BudgetOverSteps(np.array([2.0, 4.0, 6.0]), np.array([0.02, NAN, 0.03]), np.array([NAN, 0.5, 1.0]), "nats", "n")
HEAT_MAP = MaskHeatMap(np.array([0.0, 2.0, 6.0]), np.array([0.5, 2.5, 4.5]), np.array([[0.0, NAN], [0.5, 0.25]]), "n")
EXHAUSTION = FirstExhaustion(np.array([3.0, 0.0, 1.0, 0.0]), 16, "n")
PICTURES: dict[str, Callable[[], Figure]] = {
    "profile": lambda: draw_divergence_by_position(PROFILE),
    "window": lambda: draw_threshold_window(WINDOW),
    "budget": lambda: draw_budget_over_steps(BUDGET),
    "heat_map": lambda: draw_mask_heat_map(HEAT_MAP),
    "exhaustion": lambda: draw_first_exhaustion(EXHAUSTION),
}


def test_the_profile_shows_its_numbers() -> None:
    axes = draw_divergence_by_position(PROFILE).axes[0]
    curves = {patch.get_label(): patch for patch in axes.patches if isinstance(patch, StepPatch)}
    expected = {"mean over tokens": PROFILE.mean, "mean of the largest 10 % of tokens": PROFILE.largest_tenth}
    for name, values in {**expected, "threshold δ / wₜ, mean over tokens": PROFILE.limit}.items():
        np.testing.assert_array_equal(curves[name].get_data()[0], values)
        np.testing.assert_array_equal(curves[name].get_data()[1], PROFILE.edges)
    assert axes.get_xlim() == (0.5, 4.5)  # up to the last bin with a token
    assert axes.get_ylabel() == "Dₜ (probability)"
    assert axes.get_yscale() == "log"


def test_a_constant_threshold_is_called_delta() -> None:
    assert style.threshold_name(np.array([0.1, 0.1 + 1e-9, NAN])) == "threshold δ"
    assert style.threshold_name(np.array([0.1, 0.11])) == "threshold δ / wₜ"


def test_a_profile_of_nothing_is_refused() -> None:
    nothing = DivergenceByPosition(np.array([0.5, 1.5]), np.zeros(1), np.zeros(1), None, MEASURE, "n")
    with pytest.raises(ValueError, match="above 0"):
        draw_divergence_by_position(nothing)


def test_the_window_colours_bars_by_cause() -> None:
    figure = draw_threshold_window(WINDOW)
    bars = [b for b in figure.axes[0].patches if isinstance(b, Rectangle)]
    tall = {round(b.get_x() + b.get_width() / 2): b for b in bars if b.get_y() == 0}
    colours = [style.KEPT, style.TOWARD, style.BY_POSITION, style.BY_BUDGET, style.REJECTED, style.DROPPED]
    assert [to_hex(tall[t].get_facecolor()) for t in range(3, 9)] == colours
    assert [tall[t].get_height() for t in range(3, 9)] == WINDOW.divergence.tolist()
    strip = {round(b.get_x() + b.get_width() / 2): to_hex(b.get_facecolor()) for b in bars if b.get_y() < 0}
    assert [strip[t] for t in range(3, 9)] == colours
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    np.testing.assert_array_equal(lines["what the prefix left, cₜ / wₜ"], np.clip(WINDOW.effective, 0, None))  # type: ignore[arg-type]
    np.testing.assert_array_equal(lines["spent by the prefix, Sₜ"], WINDOW.spent)
    assert len(figure.axes) == 2


def test_a_window_without_thresholds_has_one_panel_and_no_lines() -> None:
    bare = ThresholdWindow(WINDOW.position, WINDOW.divergence, WINDOW.cause, None, None, None, None, MEASURE, "n")
    figure = draw_threshold_window(bare)
    assert [len(axes.lines) for axes in figure.axes] == [0]


def test_the_other_pictures_show_their_numbers() -> None:
    upper, lower = draw_budget_over_steps(BUDGET).axes
    np.testing.assert_array_equal(np.asarray(upper.lines[0].get_ydata()), BUDGET.delta_b)
    np.testing.assert_array_equal(np.asarray(lower.lines[0].get_xdata()), BUDGET.step)
    assert upper.get_ylim() == (0, pytest.approx(1.25 * 0.03))
    heat = draw_mask_heat_map(HEAT_MAP).axes[0]
    (mesh,) = [found for found in heat.collections if isinstance(found, QuadMesh)]
    shown = np.ma.masked_invalid(HEAT_MAP.rate.T)
    assert np.ma.allequal(mesh.get_array().reshape(2, 2), shown)  # type: ignore[union-attr]
    assert mesh.get_array().reshape(2, 2).mask.tolist() == shown.mask.tolist()  # type: ignore[union-attr]
    figure = draw_first_exhaustion(EXHAUSTION)
    assert [b.get_height() for b in figure.axes[0].patches if isinstance(b, Rectangle)] == [3, 0, 1, 0]
    assert any("4 of 16 responses ran out (25.0%)" in text.get_text() for text in figure.axes[0].texts)


def test_without_a_dropped_token_the_budget_has_one_panel() -> None:
    none = BudgetOverSteps(BUDGET.step, BUDGET.delta_b, np.full(3, NAN), "nats", "n")
    (axes,) = draw_budget_over_steps(none).axes
    assert axes.get_xlabel() == "optimizer steps"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_opaque_labelled_and_the_same_in_a_file(name: str, tmp_path: Path) -> None:
    figure = PICTURES[name]()
    pixels = style.to_image(figure)
    height, width = pixels.shape[:2]
    assert (width, pixels.shape[2], pixels.dtype) == (round(9.6 * style.DPI), 3, np.uint8)
    assert to_hex(pixels[0, 0] / 255) == to_hex(pixels[-1, -1] / 255) == style.BACKGROUND
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    for axes in figure.axes:
        assert axes.get_ylabel()
    assert "(" in figure.axes[0].get_ylabel() or "(" in figure.axes[0].get_xlabel()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for text in [found for axes in figure.axes for found in (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label)]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()  # noqa: PT018
    style.to_png(PICTURES[name](), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert (np.asarray(saved.convert("RGB")) == pixels).all()


def ticks(axis: Any) -> list[str]:
    axis.figure.canvas.draw()
    first, last = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if first <= tick.get_loc() <= last]


ONE = np.ones(1)


def test_steps_and_tokens_are_whole_numbers() -> None:
    """Of one rollout, of responses of one token, and late in a run that had begun elsewhere."""
    for steps, written in (([1], ["1"]), ([3000000, 3000002], ["3000000", "3000001", "3000002"])):
        count = np.ones(len(steps))
        figure = draw_budget_over_steps(BudgetOverSteps(np.array(steps, dtype=float), count, count, "nats", "n"))
        assert ticks(figure.axes[-1].xaxis) == written
    heat = draw_mask_heat_map(MaskHeatMap(np.array([0.0, 1.0]), np.array([0.5, 1.5]), ONE[None], "n")).axes[0]
    assert (ticks(heat.xaxis), ticks(heat.yaxis)) == (["0", "1"], ["1"])
    profile = draw_divergence_by_position(DivergenceByPosition(np.array([0.5, 1.5]), ONE, ONE, ONE, MEASURE, "n"))
    assert ticks(profile.axes[0].xaxis) == ["1"]


def test_one_token_shows_its_thresholds_and_budget() -> None:
    """A line of one point is nothing."""
    figure = draw_threshold_window(ThresholdWindow(ONE, ONE, np.zeros(1, int), ONE, ONE, ONE, ONE, MEASURE, "n"))
    assert [line.get_marker() for axes in figure.axes for line in axes.lines] == ["o"] * 4
    many = draw_threshold_window(WINDOW)
    assert all(line.get_marker() == "" for axes in many.axes for line in axes.lines)


def test_long_notes_and_names_are_not_cut_off() -> None:
    note = "rollout 1000, steps 31984 to 32000, each pass counted; "
    note += "tokens 9881 to 10000 of a response of 10000, where most were dropped"
    curves = [Curve(f"a set with a rather long name {i} avg@16", (0,), (0.5,), (0.4,), (0.6,)) for i in range(7)]
    for figure in (draw_threshold_window(replace(WINDOW, note=note)), validation_curves(curves)):
        height, width = style.to_image(figure).shape[:2]
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        for drawn in (*figure.axes[0].texts, *figure.legends):
            box = drawn.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height  # noqa: PT018
        assert figure.axes[0].get_window_extent(renderer).width > 0.85 * width, "and the panel has its room"
        assert len(figure.legends) == 1
    (shown,) = figure.legends[0].get_texts()[-1:]
    assert shown.get_text() == curves[-1].name


def test_drawing_leaves_matplotlibs_global_state_alone() -> None:
    settings = dict(mpl.rcParams)
    for draw in PICTURES.values():
        style.to_image(draw())
    assert dict(mpl.rcParams) == settings
    assert Gcf.get_all_fig_managers() == []


def test_figures_import_no_more_than_they_say() -> None:
    """Numbers need no matplotlib, and no picture needs torch or pyplot."""
    modules = [f"cppo_lightning.figures.{file.stem}" for file in sorted(Path(style.__file__).parent.glob("[a-z]*.py"))]
    code = (
        "import sys, importlib\n"
        "importlib.import_module('cppo_lightning.figures.numbers')\n"
        "assert 'matplotlib' not in sys.modules\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    repository = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15), full protanopia, deuteranopia and tritanopia, on linear RGB
VISION = {
    "full": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def linear(colour: str) -> np.ndarray:
    channels = np.array(to_rgb(colour))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb.clip(0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", VISION)
def test_colours_are_told_apart(eye: str) -> None:
    """A difference of 10 in CIE76 is seen at a glance."""
    tokens = (style.KEPT, style.TOWARD, style.BY_POSITION, style.BY_BUDGET, style.REJECTED, style.DROPPED)
    for colours, least in ((tokens, 20), (style.SERIES, 15)):
        seen = [lab(VISION[eye] @ linear(colour)) for colour in colours]
        assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > least


def test_text_stands_out_from_its_background() -> None:
    """WCAG 2: a contrast of 4.5 for text."""
    luminance = {c: float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (style.TEXT, style.MUTED, style.BACKGROUND)}
    for text in (style.TEXT, style.MUTED):
        assert (luminance[style.BACKGROUND] + 0.05) / (luminance[text] + 0.05) > 4.5


# ---- from sums to pictures ------------------------------------------------------------------------------------------------

DRAWN = {
    "cppo": {"divergence_by_position", "threshold_window", "first_exhausted", "mask_heat_map", "budget"},
    "soft": {"divergence_by_position", "threshold_window", "first_exhausted", "mask_heat_map", "budget"},
    "cispo": {"divergence_by_position", "threshold_window"},
}


@every_region
def test_what_there_is_is_drawn(region: TrustRegion) -> None:
    stats, bins = some_stats(7), PositionBins(1, 40)
    gate, sums, history = region(stats), summed(region, [stats], bins), SumHistory(2)
    history.add(0, 2, history_row(sums))
    measure = measure_of(region, "divergence" in gate.diagnostics)
    window = TokenWindow.of(stats, gate, region.token_threshold, 30)
    found = dict([*of_rollout(sums, window, measure, "n"), *of_run(history, bins, measure)])
    name = next(name for name, other in REGIONS.items() if other is region)
    assert set(found) == DRAWN.get(name, {"divergence_by_position", "threshold_window", "mask_heat_map"})
    assert len(found["threshold_window"].axes) == 1 + (name in ("cppo", "soft"))
    curves = [p for p in found["divergence_by_position"].axes[0].patches if isinstance(p, StepPatch)]
    assert len(curves) == 2 + (region.token_threshold is not None)
    expected = "nats" if name.startswith("trm") else "probability"
    assert found["threshold_window"].axes[0].get_ylabel() == f"Dₜ ({expected})"
    assert found["divergence_by_position"].axes[0].get_title(loc="left").endswith(measure.name)


def test_on_policy_nothing_of_a_rollout_is_drawn() -> None:
    stats = some_stats(8)
    same = TokenStats(stats.response_ids, stats.rollout_logp, stats.rollout_logp, stats.advantages, stats.mask)
    window = TokenWindow.of(same, BUDGETED(same), BUDGETED.delta, 30)
    assert list(of_rollout(summed(BUDGETED, [same], PositionBins(1, 40)), window, MEASURE, "n")) == []


def test_the_profile_of_a_rollout_is_its_means() -> None:
    stats = part(some_stats(9), [0])
    found = divergence_by_position(summed(BUDGETED, [stats], PositionBins(1, 40)), MEASURE, "n")
    diagnostics = BUDGETED(stats).diagnostics
    np.testing.assert_allclose(found.mean, diagnostics["divergence"][0], rtol=1e-6)
    np.testing.assert_allclose(found.limit, BUDGETED.delta / diagnostics["token_weight"][0], rtol=1e-6)  # type: ignore[arg-type]


def test_a_measure_is_named_as_what_it_is() -> None:
    assert measure_of(CPPO(TopKTV(5)), True) == Measure("top-5 total variation", "probability")
    assert measure_of(Intersection([PPOClip(), TRM(divergence=BinaryKL())]), True) == Measure("binary KL(µ‖π)", "nats")
    assert measure_of(PPOClip(), False) == Measure(BinaryTV().title, "probability")
    assert measure_of(SimpleNamespace(), True) == Measure("divergence of SimpleNamespace", "divergence")


# ---- the callback ---------------------------------------------------------------------------------------------------------


class Regions(Module):
    """Shows its callbacks CPPO's gates on this rank's share of some responses, in two micro-batches."""

    trust_region = BUDGETED

    def training_step(self, batch: int, batch_idx: int) -> None:
        stats = some_stats(self.trainer.global_step)
        chosen = list(range(self.global_rank, 12, self.trainer.world_size))
        for cut in (part(stats, chosen[:2]), part(stats, chosen[2:])):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TrustRegionFigures):
                    callback.on_gate(self.trainer, self, cut, self.trust_region(cut))
        self.manual_backward(self.weight.sum())
        self.optimizers().step()  # type: ignore[union-attr]


class Longer(Data):
    plan, sampling = RolloutPlan(prompts=2, samples=4, updates=UPDATES), Sampling(max_tokens=40)


def fit(folder: Path, module: Module | None = None, **settings: Any) -> dict[str, list[tuple[int, bytes]]]:
    """What TensorBoard has: ``(step, PNG)`` by tag."""
    callback = TrustRegionFigures(every_n_rollouts=2, bins=20, window=16)
    trainer(folder, [callback], **{"rollouts": 4, **settings}).fit(module or Regions(), datamodule=Longer(OUTCOMES))
    board = events(folder)
    return {tag: [(e.step, e.encoded_image_string) for e in board.Images(tag)] for tag in board.Tags()["images"]}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, bytes]]]:
    return fit(tmp_path_factory.mktemp("one"))


def test_pictures_come_with_the_first_rollout_every_few_and_with_the_last(one_rank: dict[str, list[tuple[int, bytes]]]) -> None:
    assert set(one_rank) == {f"figures/{name}" for name in DRAWN["cppo"]}
    for tag, found in one_rank.items():
        assert [step for step, _ in found] == [UPDATES - 1, 3 * UPDATES - 1, 4 * UPDATES - 1], tag
        assert len({png for _, png in found}) == 3, tag


class Stop(Callback):
    """Stops the run after the third update, the first of the second rollout."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step == UPDATES + 1


@pytest.mark.parametrize(("steps", "others"), [(UPDATES + 1, []), (-1, [Stop()])], ids=["steps", "stop"])
def test_a_rollout_that_is_cut_short_is_drawn_and_goes_on(
    steps: int, others: list[Callback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts: list[tuple[PositionSums, str]] = []
    runs: list[SumHistory] = []
    monkeypatch.setattr(run_pictures, "of_rollout", lambda sums, window, measure, note: rollouts.append((sums, note)) or ())
    monkeypatch.setattr(run_pictures, "of_run", lambda history, bins, measure: runs.append(deepcopy(history)) or ())
    callback = TrustRegionFigures(every_n_rollouts=2, bins=40, window=16)
    trainer(tmp_path, [callback, *others], rollouts=9, max_steps=steps).fit(Regions(), datamodule=Longer(OUTCOMES))
    assert [note for _, note in rollouts] == [
        f"rollout 1, steps 0 to {UPDATES}",
        f"rollout 2, steps {UPDATES} to {UPDATES + 1}",
    ]
    sums, history = rollouts[1][0], runs[1]
    own = summed(BUDGETED, [some_stats(UPDATES)], PositionBins(1, 40))
    torch.testing.assert_close(sums.flat, own.flat, rtol=1e-12, atol=1e-12)
    assert (history.starts, history.ends) == ([0, UPDATES], [UPDATES, UPDATES + 1])
    torch.testing.assert_close(history.table()[1], history_row(own), rtol=1e-12, atol=1e-12)
    assert callback.state_dict()["history"]["ends"] == [UPDATES]  # a run that goes on adds the whole rollout


def test_each_pass_over_a_rollout_counts_and_the_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(run_pictures, "of_rollout", lambda sums, window, measure, note: notes.append(note) or ())
    data = Longer(OUTCOMES)
    data.plan = RolloutPlan(prompts=2, samples=4, updates=1, passes=UPDATES)
    trainer(tmp_path, [TrustRegionFigures()], rollouts=1).fit(Regions(), datamodule=data)
    assert notes == [f"rollout 1, steps 0 to {UPDATES}, each pass counted"]


def fit_on_a_rank(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    return fit(folder, rollouts=1, devices=2, strategy="ddp", use_distributed_sampler=False)


@pytest.mark.slow
def test_two_ranks_draw_the_same_pictures_as_one(one_rank: dict[str, list[tuple[int, bytes]]], tmp_path: Path) -> None:
    found, _ = on_ranks(2, fit_on_a_rank, tmp_path)
    assert found == {tag: pictures[:1] for tag, pictures in one_rank.items()}


class Rest:
    """A trainer that stands between two updates, for callbacks alone."""

    loggers: tuple[()] = ()
    callbacks: tuple[()] = ()
    is_global_zero = True
    strategy = SimpleNamespace(reduce=lambda value, group, reduce_op: value, all_gather=lambda value: value)
    datamodule = Longer(OUTCOMES)

    def __init__(self, update: int) -> None:
        self.global_step, self.current_epoch = update, update // 3
        self.is_last_batch = update % 3 == 2


def train(callback: TrustRegionFigures, updates: range) -> None:
    module = Regions()
    for update in updates:
        rest: Any = Rest(update)
        callback.on_train_batch_start(rest, module, None, update % 3)  # type: ignore[arg-type]
        stats = some_stats(update)
        callback.on_gate(rest, module, stats, BUDGETED(stats))
        rest.global_step += 1
        callback.on_train_batch_end(rest, module, None, None, update % 3)  # type: ignore[arg-type]


def fresh() -> TrustRegionFigures:
    callback = TrustRegionFigures(every_n_rollouts=1, bins=8, window=16, history=2)
    rest: Trainer = Rest(0)  # type: ignore[assignment]
    callback.setup(rest, Regions(), "fit")
    return callback


@pytest.mark.parametrize("stop", range(1, 15))
def test_a_resumed_run_has_the_sums_of_one_that_never_stopped(stop: int) -> None:
    whole, first, second = fresh(), fresh(), fresh()
    train(whole, range(15))
    train(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    stats = some_stats(99)
    first.on_gate(Rest(stop), Regions(), stats, BUDGETED(stats))  # type: ignore[arg-type]  # an update that is not finished is not kept
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, range(stop, 15))
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_ranks_that_train_on_the_same_batch_count_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, paired = fresh(), fresh()
    train(alone, range(4))
    parts = {"data_parallel": SimpleNamespace(get_group=lambda: "one of each pair")}
    ranks = {None: 2, "one of each pair": 1}

    def reduce(value: torch.Tensor, group: str | None = None, reduce_op: str = "mean") -> torch.Tensor:
        return ranks[group] * value

    pairs = SimpleNamespace(device_mesh=parts, reduce=reduce, all_gather=lambda value: torch.stack([value, value]))
    monkeypatch.setattr(Rest, "strategy", pairs)
    train(paired, range(4))
    torch.testing.assert_close(paired.state_dict(), alone.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_of_other_bins_is_left_alone() -> None:
    other, ours = TrustRegionFigures(bins=10, window=16), fresh()
    other.setup(Rest(0), Regions(), "fit")  # type: ignore[arg-type]
    before = ours.state_dict()
    with pytest.warns(UserWarning, match="starts anew"):
        ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours.state_dict(), before)


def test_an_evaluation_passes_over_what_a_checkpoint_has() -> None:
    trained, evaluated = fresh(), TrustRegionFigures()
    train(trained, range(4))
    evaluated.setup(Rest(0), Regions(), "validate")  # type: ignore[arg-type]
    with warnings.catch_warnings(action="error"):
        evaluated.load_state_dict(trained.state_dict())


class Clipped(Regions):
    """PPO's clip, and an update with nothing to train on."""

    trust_region = PPOClip()  # type: ignore[assignment]

    def training_step(self, batch: int, batch_idx: int) -> None:
        if batch_idx == 0:
            super().training_step(batch, batch_idx)


def test_a_trust_region_without_budget_and_an_empty_update(tmp_path: Path) -> None:
    found = fit(tmp_path, Clipped(), rollouts=1)
    assert set(found) == {"figures/divergence_by_position", "figures/threshold_window", "figures/mask_heat_map"}


@pytest.mark.parametrize("wrong", [{"every_n_rollouts": 0}, {"bins": 0}, {"window": -1}, {"history": 3}])
def test_settings_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"TrustRegionFigures.{next(iter(wrong))}"):
        TrustRegionFigures(**wrong)
