"""GSPO and SAPO against the worked vectors; oracles and gradients are in ``test_strategies.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import GSPO, SAPO
from tests.test_cppo import random_stats
from tests.worked import VECTORS, response, stack


def test_gspo_worked_vectors() -> None:
    stats = stack(response("A"), response("B"))
    gate = GSPO()(stats)
    (s_a, loss_a), (s_b, loss_b) = VECTORS["gspo_A"], VECTORS["gspo_B"]
    value = -gate.diagnostics["surrogate"]
    np.testing.assert_allclose(value[0].numpy(), [loss_a] * 4, rtol=2e-6)
    np.testing.assert_allclose(value[1, :3].numpy(), [loss_b] * 3, rtol=2e-6)
    assert s_a > 1 + 4e-4  # A has advantage +1 and is clipped whole; B has -1 and moves back
    assert gate.diagnostics["rejected"].tolist() == [True, False]
    assert not gate.weight[0].any()
    np.testing.assert_allclose(gate.weight[1, :3].numpy(), [s_b] * 3, rtol=2e-6)
    coefficients = LossAggregation("seq-mean-token-mean").coefficients(stats.mask, Totals(stats.mask.sum(), torch.tensor(2)))
    loss = -surrogate_value(stats.advantages, gate, coefficients)
    assert float(loss) == pytest.approx((loss_a + loss_b) / 2, rel=2e-6)


def test_gspo_with_the_mean_over_responses_is_the_papers_gradient_and_by_tokens_is_not() -> None:
    """d/dlogp of ``mean_i min(s_i A_i, clip(s_i) A_i)``: a long response's tokens share one response's weight."""
    stats, region = random_stats(3), GSPO(0.1, 0.2)
    mask, advantages = stats.mask, stats.advantages
    rollout = stats.rollout_logp.masked_fill(~mask, 0)
    logp = stats.logp.masked_fill(~mask, 0).requires_grad_()
    length = mask.sum(-1)
    s = (((logp - rollout) * mask).sum(-1) / length).exp()
    objective = torch.minimum(s * advantages[:, 0], s.clamp(0.9, 1.2) * advantages[:, 0]).mean()
    (expected,) = torch.autograd.grad(-objective, logp)
    gate = region(stats)
    assert 0 < int(gate.diagnostics["rejected"].sum()) < len(mask)
    gradients = {}
    for kind in ("seq-mean-token-mean", "token-mean"):
        coefficients = LossAggregation(kind).coefficients(mask, Totals(mask.sum(), torch.tensor(len(mask))))
        (gradients[kind],) = torch.autograd.grad(policy_gradient_loss(logp, advantages, gate, coefficients), logp)
    torch.testing.assert_close(gradients["seq-mean-token-mean"], expected, rtol=1e-5, atol=1e-8)
    by_length = expected * (length * len(mask) / mask.sum())[:, None]
    torch.testing.assert_close(gradients["token-mean"], by_length, rtol=1e-5, atol=1e-8)


def test_sapo_worked_vectors() -> None:
    stats = stack(response("A"), response("B"))
    gate = SAPO()(stats)
    for row, key in enumerate("AB"):
        own, expected = stats.mask[row], VECTORS[f"sapo_{key}"]
        value = gate.diagnostics["surrogate"][row, own].numpy()
        np.testing.assert_allclose(value / stats.advantages[row, own].numpy(), expected["gate"], rtol=2e-6)
        np.testing.assert_allclose(-value, expected["loss"], rtol=2e-6)
        np.testing.assert_allclose((-stats.advantages * gate.weight)[row, own].numpy(), expected["g"], rtol=2e-6)


def test_sapo_keeps_its_temperatures_whatever_tensors_are_by_default() -> None:
    """As a bfloat16, 1.05 would be 1.047."""
    stats = random_stats(2)
    expected = SAPO()(stats)
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = SAPO()(stats)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(gate.weight, expected.weight)
    assert torch.equal(gate.diagnostics["surrogate"], expected.diagnostics["surrogate"])


def test_sapo_fades_faster_where_the_advantage_is_negative() -> None:
    stats = random_stats(1)
    weights = {}
    for sign in (1, -1):
        weights[sign] = SAPO(1.0, 3.0)(type(stats)(**{**vars(stats), "advantages": sign * stats.advantages.abs()})).weight
    far = stats.mask & (stats.ratio > 1.2)
    assert bool(far.any())
    assert bool((weights[-1][far] < weights[1][far]).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GSPO(eps_low=0.0), r"GSPO\.eps_low must be in \(0, 1\] .* got 0"),
        (lambda: GSPO(eps_high=-1.0), r"GSPO\.eps_high must be above 0 .* got -1"),
        (lambda: SAPO(tau_pos=0.0), r"SAPO\.tau_pos must be above 0 .* got 0"),
        (lambda: SAPO(tau_neg=-1.0), r"SAPO\.tau_neg must be above 0 .* got -1"),
    ],
)
def test_bad_settings_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
