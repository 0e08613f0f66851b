"""TRM and Intersection against the worked vectors; oracles, identities and gradients are in ``test_strategies.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch

from cppo_lightning.divergences import BinaryKL, BinaryTV, SampledK2, SampledK3, TopKKL, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, surrogate_value
from cppo_lightning.positions import token_limit
from cppo_lightning.trust_regions import CISPO, CPPO, DPPO, TRM, Intersection, PPOClip, SoftCPPO, TrustRegion
from tests.test_cppo import random_stats
from tests.worked import RESPONSES, VECTORS, response


def full(reduce: str, delta: float | None = None) -> TRM:
    return TRM(reduce, delta, TopKKL(VOCABULARY))  # type: ignore[arg-type]


VOCABULARY = 3  # of D and E, which decide; A and B, rejected by all, have 6 and a smaller KL in 3 bins of it
CASES: dict[str, TrustRegion] = {
    "M_max_005": full("max"),
    "M_avg_0001": full("mean"),
    "M_both_01_0002": Intersection([full("max", 0.1), full("mean", 0.002)]),
    "M_max_k2_005": TRM("max", 0.05, SampledK2()),
    "M_avg_k3_0001": TRM("mean", 0.001, SampledK3()),
}


@pytest.mark.parametrize("name", CASES)
def test_worked_vectors(name: str) -> None:
    expected, tokens = VECTORS["trm"], sum(len(ids) for _, ids, _, _ in RESPONSES.values())
    totals = Totals(torch.tensor(tokens), torch.tensor(len(RESPONSES)))
    sums = {"seq-mean-token-sum-norm": 0.0, "token-mean": 0.0}
    for key in RESPONSES:
        stats = response(key, k=VOCABULARY)
        gate = CASES[name](stats)
        accepted = bool(expected[key][name])
        assert gate.keep.tolist() == [[accepted] * stats.mask.shape[1]]
        assert gate.diagnostics["rejected"].tolist() == [not accepted]
        for kind in sums:
            horizon = 1 if kind.endswith("norm") else None
            coefficients = LossAggregation(kind, horizon).coefficients(stats.mask, totals)  # type: ignore[arg-type]
            sums[kind] -= float(surrogate_value(stats.advantages, gate, coefficients))
    if f"{name}_loss_over_N" in expected:  # rejected responses stay in the denominator
        assert sums["seq-mean-token-sum-norm"] == pytest.approx(expected[f"{name}_loss_over_N"], rel=1e-5)
        assert sums["token-mean"] == pytest.approx(expected[f"{name}_token_mean_all_tokens"], rel=1e-5)


@pytest.mark.parametrize("name", RESPONSES)
def test_worked_statistics(name: str) -> None:
    whole, two = response(name, k=len(RESPONSES[name][2][0])), response(name, k=2)
    expected = VECTORS["trm"][name]
    for region, stats, key in (
        (TRM("max", divergence=TopKKL(whole_k(name))), whole, "max_kl"),
        (TRM("mean", divergence=TopKKL(whole_k(name))), whole, "avg_kl"),
        (TRM("max", divergence=TopKKL(2)), two, "topk_max"),
        (TRM("mean", divergence=TopKKL(2)), two, "topk_avg"),
        (TRM("max", divergence=SampledK2()), two, "max_k2"),
        (TRM("mean", divergence=SampledK3()), two, "avg_k3"),
    ):
        value = region.whole(region.divergence(stats), stats.mask)
        np.testing.assert_allclose(value.numpy(), [expected[key]], rtol=1e-5, atol=2e-7, err_msg=key)


def whole_k(name: str) -> int:
    return len(RESPONSES[name][2][0])


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_response_at_the_threshold_is_kept(reduce: Literal["max", "mean"]) -> None:
    stats = response("D")
    region = TRM(reduce, divergence=BinaryKL())
    whole = region.whole(region.divergence(stats), stats.mask)
    for delta, kept in ((float(whole), True), (float(whole.nextafter(torch.tensor(0.0))), False)):
        assert bool(TRM(reduce, delta, BinaryKL())(stats).keep.all()) is kept


def test_neither_sign_nor_direction_matters() -> None:
    stats = random_stats(4)
    flipped = type(stats)(**{**vars(stats), "advantages": -stats.advantages})
    gate = TRM("mean", 0.02, TopKKL(5))(stats)
    assert torch.equal(gate.keep, TRM("mean", 0.02, TopKKL(5))(flipped).keep)
    assert 0 < int(gate.diagnostics["rejected"].sum()) < len(stats.mask)
    assert torch.equal(gate.keep.any(-1), ~gate.diagnostics["rejected"])
    assert torch.equal(gate.keep, stats.mask & gate.keep.any(-1, keepdim=True))


def test_an_intersection_of_masks_has_no_order() -> None:
    stats = random_stats(5)
    regions: list[TrustRegion] = [DPPO(BinaryTV(), 0.1), TRM("max", 0.5, TopKTV(5)), PPOClip(0.2, 0.2)]
    forward, backward = Intersection(regions)(stats), Intersection(regions[::-1])(stats)
    each = [region(stats) for region in regions]
    assert torch.equal(forward.keep, each[0].keep & each[1].keep & each[2].keep)
    assert all(not torch.equal(forward.keep, gate.keep) for gate in each), "one of them decides alone"
    assert torch.equal(forward.keep, backward.keep)
    assert torch.equal(forward.weight, backward.weight)
    assert torch.equal(forward.weight, (stats.ratio * forward.keep))


def test_an_intersection_has_the_first_ones_weight_and_objective() -> None:
    stats = random_stats(6)
    cispo, trm = CISPO(0.0, 1.5), TRM("mean", 0.02, TopKKL(5))
    gate, alone, rejected = Intersection([cispo, trm])(stats), cispo(stats), trm(stats).diagnostics["rejected"]
    assert 0 < int(rejected.sum()) < len(rejected)
    assert torch.equal(gate.weight, alone.weight.masked_fill(rejected[:, None], 0))
    expected = alone.diagnostics["surrogate"].masked_fill(rejected[:, None], 0)
    assert torch.equal(gate.diagnostics["surrogate"], expected)
    other = Intersection([trm, cispo])(stats)
    assert torch.equal(other.weight, trm(stats).weight)
    assert "surrogate" not in other.diagnostics
    assert Intersection([trm, cispo]).top_k == 5
    assert not Intersection([cispo, trm]).recomputable
    assert Intersection([cispo, PPOClip()]).recomputable


@pytest.mark.parametrize("first", [SoftCPPO(BinaryTV(), delta=0.1, delta_b=0.01), PPOClip(0.1, 0.1)], ids=["soft", "clip"])
def test_what_one_of_the_others_drops_is_not_trained_on(first: TrustRegion) -> None:
    """Whatever the first one says: SoftCPPO trains on what it does not keep, and clipped tokens have an objective too."""
    stats = random_stats(8)
    trm = TRM("max", 0.05, BinaryKL())
    gate, alone, accepted = Intersection([first, trm])(stats), first(stats), trm(stats).keep
    assert (alone.weight.bool() | alone.diagnostics.get("surrogate", alone.weight).bool())[~alone.keep & ~accepted].any()
    assert alone.weight[accepted].any()
    assert torch.equal(gate.weight, alone.weight * accepted)
    assert torch.equal(gate.keep, alone.keep & accepted)
    if "surrogate" in alone.diagnostics:
        assert torch.equal(gate.diagnostics["surrogate"], alone.diagnostics["surrogate"].masked_fill(~accepted, 0))


def test_the_threshold_is_that_of_the_divergence_which_is_shown() -> None:
    stats = random_stats(9)
    clip, cppo, trm, mean = PPOClip(), CPPO(TopKTV(5), delta=0.3), TRM("max", 0.07, BinaryKL()), TRM("mean", 0.01, BinaryKL())
    for regions, shown in (([clip, cppo, trm], cppo), ([trm, cppo], trm), ([mean, cppo], mean)):
        both = Intersection(regions)
        assert both.token_threshold == shown.token_threshold
        assert torch.equal(both(stats).diagnostics["divergence"], shown(stats).diagnostics["divergence"])
    assert Intersection([clip, CISPO()]).token_threshold is None


@pytest.mark.parametrize("shown", [DPPO(BinaryTV(), 0.1), TRM("max", 0.07, BinaryKL())], ids=["dppo", "trm"])
def test_no_weights_of_one_region_stand_next_to_the_divergence_of_another(shown: DPPO | TRM) -> None:
    """Its limit on D_t would be delta / w_t, and S_t would be of another D_t."""
    stats, cppo = random_stats(9), CPPO(TopKTV(5), delta=0.3)
    cppos = ("token_weight", "weighted_divergence", "budget_allowed")
    both = Intersection([PPOClip(), shown, cppo])
    gate, delta = both(stats), both.token_threshold
    assert delta is not None
    assert torch.equal(token_limit(stats, gate, delta), stats.mask * delta)
    assert not any(name in gate.diagnostics for name in cppos)
    assert torch.equal(gate.diagnostics["budget_spent"], cppo(stats).diagnostics["budget_spent"])
    for regions in ([PPOClip(), cppo, shown], [cppo, shown, CPPO(BinaryTV())]):
        gate = Intersection(regions)(stats)
        assert all(torch.equal(gate.diagnostics[name], cppo(stats).diagnostics[name]) for name in cppos)


@dataclass(frozen=True)
class Counting(PPOClip):
    """Keeps how often it was asked."""

    asked: list[int] = field(default_factory=lambda: [0])

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked[0] = state["asked"]


def test_an_intersection_keeps_what_each_of_its_regions_keeps() -> None:
    saved = Intersection([Counting(asked=[3]), DPPO(BinaryTV()), Counting(asked=[5])]).state_dict()
    first, last = Counting(), Counting()
    resumed = Intersection([first, DPPO(BinaryTV()), last])
    resumed.load_state_dict(saved)
    assert (first.asked, last.asked) == ([3], [5])
    resumed.load_state_dict({})  # of a checkpoint from before there was any
    assert (first.asked, last.asked) == ([3], [5])


def test_rejected_is_true_where_any_region_rejects() -> None:
    stats = random_stats(7)
    one, other = TRM("max", 0.3, SampledK2()), TRM("mean", 0.05, TopKTV(5))
    rejected = [region(stats).diagnostics["rejected"] for region in (one, other)]
    assert torch.equal(Intersection([one, other])(stats).diagnostics["rejected"], rejected[0] | rejected[1])
    assert not torch.equal(rejected[0], rejected[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TRM("sum"), r"TRM\.reduce must be max or mean, got 'sum'"),  # type: ignore[arg-type]
        (lambda: TRM("max", 0.0), r"TRM\.delta must be above 0 .* got 0"),
        (lambda: Intersection([]), r"Intersection\.trust_regions must hold at least one"),
    ],
)
def test_bad_settings_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
