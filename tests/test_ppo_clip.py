from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import PPOClip
from tests.test_cppo import random_stats
from tests.worked import VECTORS, from_probabilities, response, stack

CASES = {
    "grpo_sym_0.2": PPOClip(0.2, 0.2),
    "grpo_clip_higher": PPOClip(),
    "grpo_clip_higher_dual3": PPOClip(dual_clip=3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_worked_vectors(name: str) -> None:
    stats, expected = stack(response("A"), response("B")), VECTORS[name]
    gate = CASES[name](stats)
    for row, key in enumerate("AB"):
        own = stats.mask[row]
        np.testing.assert_allclose(-gate.diagnostics["surrogate"][row, own].numpy(), expected[key]["loss"], rtol=2e-6)
        np.testing.assert_allclose((-stats.advantages * gate.weight)[row, own].numpy(), expected[key]["g"], rtol=2e-6)
        if name != "grpo_clip_higher_dual3":  # the vector's mask leaves the dual clip out
            assert gate.keep[row, own].tolist() == [bool(k) for k in expected[key]["mask_form_keep"]]
    totals = Totals(stats.mask.sum(), torch.tensor(2))
    for kind, horizon in (("token-mean", None), ("seq-mean-token-mean", None), ("seq-mean-token-sum-norm", 4)):
        coefficients = LossAggregation(kind, horizon).coefficients(stats.mask, totals)  # type: ignore[arg-type]
        value = -surrogate_value(stats.advantages, gate, coefficients)
        assert float(value) == pytest.approx(expected["agg"][kind.replace("-", "_")], rel=2e-6)


@pytest.mark.parametrize("clip", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_textbook_surrogate(clip: PPOClip, seed: int) -> None:
    stats = random_stats(seed)
    mask, advantages = stats.mask, stats.advantages
    rollout = stats.rollout_logp.masked_fill(~mask, 0)
    logp = stats.logp.masked_fill(~mask, 0).requires_grad_()
    ratio = (logp - rollout).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip.eps_low, 1 + clip.eps_high) * advantages)
    if clip.dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, clip.dual_clip * advantages), objective)
    (expected,) = torch.autograd.grad(-(objective * mask).sum() / mask.sum(), logp)

    coefficients = LossAggregation().coefficients(mask, Totals(mask.sum(), torch.tensor(len(mask))))
    loss = policy_gradient_loss(logp, advantages, clip(stats), coefficients)
    (ours,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_a_ratio_on_the_edge_is_kept() -> None:
    stats = response("A")
    rho = stats.ratio[0].double()
    up, down = 1, 3  # 2.4 where A > 0, and 0.71 where A < 0
    for nudge, kept in ((0.0, True), (5e-7, False)):  # two float32 at 2.4
        assert bool(PPOClip(0.2, float(rho[up] - 1) - nudge)(stats).keep[0, up]) is kept
        negative = replace(stats, advantages=-stats.advantages)
        assert bool(PPOClip(float(1 - rho[down]) - nudge, 0.2)(negative).keep[0, down]) is kept
        dual = PPOClip(0.2, 0.2, dual_clip=float(rho[up]) - nudge)
        assert bool(dual(negative).keep[0, up]) is kept


def test_a_clipped_token_has_no_gradient_however_large_its_ratio() -> None:
    """e^119 overflows float32, and 0 times it is not a number."""
    for advantage, clip in ((1.0, PPOClip()), (-1.0, PPOClip(dual_clip=3.0))):
        stats = replace(from_probabilities([0.5, 0.5], [0.5, 0.5], advantage), rollout_logp=torch.tensor([[-120.0, -0.5]]))
        assert stats.ratio[0, 0] == float("inf")
        gate = clip(stats)
        assert gate.keep.tolist() == [[False, True]]
        assert torch.equal(gate.weight, torch.where(gate.keep, stats.ratio, 0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps_low": 0}, r"PPOClip\.eps_low must be in \(0, 1\]"),
        ({"eps_high": -0.1}, r"PPOClip\.eps_high must be above 0"),
        ({"eps_high": float("nan")}, r"PPOClip\.eps_high must be above 0 .* got nan"),
        ({"dual_clip": 1.0}, r"PPOClip\.dual_clip must be above 1"),
        ({"dual_clip": float("nan")}, r"PPOClip\.dual_clip must be above 1 .* got nan"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOClip(**settings)
