"""CISPO and MinPRO against the worked vectors; oracles and gradients are in ``test_strategies.py``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cppo_lightning.batch import TokenStats
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import CISPO, MinPRO
from tests.test_cppo import random_stats
from tests.worked import VECTORS, from_probabilities, response, stack

CASES = {
    "cispo_cap5": CISPO(),
    "cispo_cap2": CISPO(max_weight=2.0),
    "cispo_two_sided_0.8_1.28": CISPO(0.8, 1.28),
    "minpro_strict_0_5": MinPRO(),
    "minpro_strict_0.8_1.28": MinPRO(0.8, 1.28),
}
F = from_probabilities([0.5, 0.2, 0.3, 0.5, 0.2], [0.45, 0.30, 0.18, 0.55, 0.40], 1.0)


@pytest.mark.parametrize("name", CASES)
def test_worked_vectors(name: str) -> None:
    stats, expected = stack(response("A"), response("B")), VECTORS[name]
    gate = CASES[name](stats)
    for row, key in enumerate("AB"):
        own = stats.mask[row]
        np.testing.assert_allclose(gate.weight[row, own].numpy(), expected[key]["w"], rtol=2e-6)
        np.testing.assert_allclose((-stats.advantages * gate.weight)[row, own].numpy(), expected[key]["g"], rtol=2e-6)
        np.testing.assert_allclose(-gate.diagnostics["surrogate"][row, own].numpy(), expected[key]["loss"], rtol=2e-6)
        if "product" in expected[key]:
            np.testing.assert_allclose(CASES[name].importance(stats)[row, own].numpy(), expected[key]["product"], rtol=2e-6)
    totals = Totals(stats.mask.sum(), torch.tensor(2))
    for kind, horizon in (("token-mean", None), ("seq-mean-token-mean", None), ("seq-mean-token-sum-norm", 4)):
        coefficients = LossAggregation(kind, horizon).coefficients(stats.mask, totals)  # type: ignore[arg-type]
        value = -surrogate_value(stats.advantages, gate, coefficients)
        loss = policy_gradient_loss(stats.logp.masked_fill(~stats.mask, 0), stats.advantages, gate, coefficients)
        for ours in (value, loss):  # the objective is written with log pi, so the two agree
            assert float(ours) == pytest.approx(expected["agg"][kind.replace("-", "_")], rel=1e-5)


@pytest.mark.parametrize(("name", "minpro"), [("minpro_F_0_5", MinPRO()), ("minpro_F_0.8_1.28", MinPRO(0.8, 1.28))])
def test_ratios_below_one(name: str, minpro: MinPRO) -> None:
    gate, expected = minpro(F), VECTORS[name]
    np.testing.assert_allclose(F.ratio[0].numpy(), expected["rho"], rtol=2e-6)
    np.testing.assert_allclose(gate.weight[0].numpy(), expected["w"], rtol=2e-6)
    np.testing.assert_allclose(-gate.diagnostics["surrogate"][0].numpy(), expected["loss"], rtol=2e-6)
    np.testing.assert_allclose(-gate.weight[0].numpy(), expected["g"], rtol=2e-6)
    assert float(-gate.diagnostics["surrogate"].mean()) == pytest.approx(expected["token_mean"], rel=2e-6)


def test_the_prefix_minimum_may_lie_above_one() -> None:
    """The variant that starts the minimum at 1, ``minpro_seed1_0_5``, would weight A's second token by its own ratio."""
    weight = MinPRO()(response("A")).weight[0]
    assert float(weight[1]) == pytest.approx(2.832)
    assert VECTORS["minpro_seed1_0_5"]["A"]["w"][1] == 2.4


def test_untrained_tokens_are_no_part_of_the_prefix() -> None:
    """An untrained token reads as ratio 1, which would be the minimum of a prefix whose ratios are all above."""
    alone = from_probabilities([0.5, 0.5, 0.5], [0.6, 0.7, 0.55], 1.0)
    with_gap = from_probabilities([0.5, 0.9, 0.5, 0.5], [0.6, 0.1, 0.7, 0.55], 1.0)
    with_gap = TokenStats(**{**vars(with_gap), "mask": torch.tensor([[True, False, True, True]])})
    assert torch.equal(MinPRO()(with_gap).weight[with_gap.mask], MinPRO()(alone).weight[0])


def test_equal_ratios_of_one_make_minpro_cispo() -> None:
    stats = random_stats(2)
    first = stats.mask & (stats.mask.cumsum(-1) == 1)
    moved = TokenStats(**{**vars(stats), "logp": torch.where(first, stats.rollout_logp + 0.3, stats.rollout_logp)})
    # only the first token moved: its own weight is CISPO's, those after it carry its ratio
    minpro, cispo = MinPRO()(moved), CISPO()(moved)
    assert torch.equal(minpro.weight[first], cispo.weight[first])
    later = stats.mask & (stats.mask.cumsum(-1) == 2)
    torch.testing.assert_close(minpro.weight[later], torch.full_like(minpro.weight[later], math.exp(0.3)), rtol=1e-6, atol=0)


def test_nothing_is_dropped() -> None:
    stats = random_stats(3)
    for region in (CISPO(), MinPRO(), CISPO(0.0, math.inf)):
        assert torch.equal(region(stats).keep, stats.mask)
    assert torch.equal(CISPO(0.0, math.inf)(stats).weight, stats.ratio * stats.mask)


def test_what_may_be_anchored_at_pi_old() -> None:
    assert CISPO().recomputable
    assert not MinPRO().recomputable


@pytest.mark.parametrize("cls", [CISPO, MinPRO])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_weight": -0.1}, r"\.min_weight must be in \[0, 1\] .* got -0\.1"),
        ({"min_weight": 1.5}, r"\.min_weight must be in \[0, 1\]"),
        ({"max_weight": 0.28}, r"\.max_weight must be at least 1 .* got 0\.28"),
    ],
)
def test_bad_settings_are_named(cls: type[CISPO], settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=cls.__name__ + message):
        cls(**settings)
