"""DPPO against the worked vectors; its oracle, identities and gradient are in ``test_strategies.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cppo_lightning.divergences import BinaryKL, BinaryTV, TopKKL, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import DPPO
from tests.test_cppo import random_stats
from tests.worked import VECTORS, response, stack

CASES = {
    "dppo_binary_tv_0.15": DPPO(BinaryTV(), 0.15),
    "dppo_binary_tv_0.20": DPPO(BinaryTV(), 0.2000001),  # the vector has a D of exactly 0.2, which float32 rounds up
    "dppo_binary_kl_0.05": DPPO(BinaryKL(), 0.05),
    "dppo_topk_tv_0.15_union": DPPO(TopKTV(2), 0.15),
    "dppo_topk_tv_0.12_union": DPPO(TopKTV(2), 0.12),
    "dppo_topk_kl_0.05_union": DPPO(TopKKL(2), 0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_worked_vectors(name: str) -> None:
    stats, expected = stack(response("A"), response("B")), VECTORS[name]
    gate = CASES[name](stats)
    for row, key in enumerate("AB"):
        own = stats.mask[row]
        np.testing.assert_allclose(gate.diagnostics["divergence"][row, own].numpy(), expected[key]["D"], rtol=1e-5, atol=2e-7)
        assert gate.keep[row, own].tolist() == [bool(k) for k in expected[key]["keep"]]
        np.testing.assert_allclose((-stats.advantages * gate.weight)[row, own].numpy(), expected[key]["g"], rtol=2e-6)
    totals = Totals(stats.mask.sum(), torch.tensor(2))
    for kind, horizon in (("token-mean", None), ("seq-mean-token-mean", None), ("seq-mean-token-sum-norm", 4)):
        coefficients = LossAggregation(kind, horizon).coefficients(stats.mask, totals)  # type: ignore[arg-type]
        value = -surrogate_value(stats.advantages, gate, coefficients)
        logp_form = policy_gradient_loss(stats.logp.masked_fill(~stats.mask, 0), stats.advantages, gate, coefficients)
        key = kind.replace("-", "_")
        assert float(value) == pytest.approx(expected["agg_ratio_form"][key], rel=1e-5)
        assert float(logp_form) == pytest.approx(expected["agg_logp_form"][key], rel=1e-5)


def test_the_sampled_token_gets_a_bin_beside_the_top_k_and_not_in_place_of_one() -> None:
    """Public code replaces the K-th token; the papers have the union, which sees more of A's second token."""
    gate, replaced = DPPO(TopKTV(2), 0.12)(response("A")), VECTORS["dppo_topk_tv_0.12_replace"]["A"]
    assert float(gate.diagnostics["divergence"][0, 1]) > replaced["D"][1] + 0.02
    assert not bool(gate.keep[0, 1])
    assert replaced["keep"][1] == 1


def test_a_token_at_the_threshold_is_kept() -> None:
    stats = response("A")
    found = BinaryTV()(stats)[0, 2]
    for delta, kept in ((float(found), True), (float(found.nextafter(torch.tensor(0.0))), False)):
        assert bool(DPPO(BinaryTV(), delta)(stats).keep[0, 2]) is kept


def test_max_ratio_caps_the_weight_and_not_the_decision() -> None:
    free, capped = DPPO(TopKTV(5))(random_stats(2)), DPPO(TopKTV(5), max_ratio=1.1)(random_stats(2))
    assert torch.equal(free.keep, capped.keep)
    assert torch.equal(capped.weight, free.weight.clamp(max=1.1))
    assert float(free.weight.max()) > 1.1


def test_captured_mass_is_that_of_the_divergence_it_decides_by() -> None:
    stats = response("A", k=4)  # carries more than DPPO reads
    np.testing.assert_allclose(
        DPPO(TopKTV(2))(stats).diagnostics["captured_mass"][0].numpy(), [0.8, 0.8, 0.84, 0.85], rtol=1e-6
    )
    assert "captured_mass" not in DPPO(BinaryTV())(stats).diagnostics
    assert (DPPO(TopKTV(2)).top_k, DPPO(BinaryTV()).top_k) == (2, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, r"DPPO\.delta must be above 0 .* got 0"),
        ({"delta": float("nan")}, r"DPPO\.delta must be above 0 .* got nan"),
        ({"max_ratio": -1.0}, r"DPPO\.max_ratio must be above 0, or null .* got -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPPO(**settings)  # pyright: ignore[reportArgumentType]
