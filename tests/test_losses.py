"""Aggregations, reference KL and advantages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cppo_lightning.advantages import GroupRelative, has_spread
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, ReferenceKL, Totals
from tests.worked import VECTORS


@pytest.mark.parametrize(
    ("kind", "horizon"), [("token-mean", None), ("seq-mean-token-mean", None), ("seq-mean-token-sum-norm", 7)]
)
def test_coefficients_do_not_depend_on_how_a_step_is_cut(kind: str, horizon: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 10, generator=g) < 0.6
    loss = torch.randn(6, 10, generator=g)
    totals = Totals(mask.sum(), torch.tensor(6))
    aggregation = LossAggregation(kind, horizon)  # type: ignore[arg-type]
    whole = (aggregation.coefficients(mask, totals) * loss).sum()
    parts = sum((aggregation.coefficients(mask[i : i + 2], totals) * loss[i : i + 2]).sum() for i in (0, 2, 4))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    rows = [loss[i][mask[i]] for i in range(6)]
    textbook = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([r.mean() for r in rows]).mean(),
        "seq-mean-token-sum-norm": torch.stack([r.sum() / 7 for r in rows]).mean(),
    }
    torch.testing.assert_close(whole, textbook[kind], rtol=1e-5, atol=1e-7)


def test_reference_kl_values_and_derivatives() -> None:
    logp, reference = torch.tensor([0.60, 0.45]).log().requires_grad_(), torch.tensor([0.50, 0.55]).log()
    expected = VECTORS["kl_est"]
    for estimator, gradient in (("k1", [1.0, 1.0]), ("k2", expected["dk2"]), ("k3", expected["dk3"])):
        value = ReferenceKL(0.1, estimator)(logp, reference)  # type: ignore[arg-type]
        np.testing.assert_allclose(value.detach().numpy(), expected[estimator], rtol=3e-6)
        (actual,) = torch.autograd.grad(value.sum(), logp)
        np.testing.assert_allclose(actual.numpy(), gradient, rtol=3e-6)


def test_k1_and_k3_are_unbiased() -> None:
    """Over every token of a small vocabulary, the expectations of k1 and k3 are KL(pi || ref)."""
    g = torch.Generator().manual_seed(0)
    logp, reference = (torch.randn(9, generator=g).log_softmax(-1) for _ in range(2))
    exact = (logp.exp() * (logp - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = (logp.exp() * ReferenceKL(1.0, estimator)(logp, reference)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-6)


def test_group_relative_advantages() -> None:
    expected = VECTORS["group_adv"]
    rewards = torch.tensor([expected["rewards"], [1.0] * 8])
    np.testing.assert_allclose(GroupRelative()(rewards)[0].numpy(), expected["adv_std"], rtol=1e-6)
    np.testing.assert_allclose(GroupRelative(normalize_std=False)(rewards)[0].numpy(), expected["adv_nostd"], rtol=1e-6)
    assert torch.equal(GroupRelative()(rewards)[1], torch.zeros(8))
    assert has_spread(rewards).tolist() == [True, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LossAggregation("mean"), "must be one of token-mean"),  # type: ignore[arg-type]
        (lambda: LossAggregation("seq-mean-token-sum-norm"), "horizon"),
        (lambda: LossAggregation("token-mean", 5), "horizon"),
        (lambda: LossAggregation("seq-mean-token-sum-norm", 0), "at least 1"),
        (lambda: ReferenceKL(0.0), "reference_kl: null"),
        (lambda: ReferenceKL(0.1, "k4"), "k1, k2 or k3"),  # type: ignore[arg-type]
        (lambda: GroupRelative(eps=-1), "at least 0"),
    ],
)
def test_bad_settings_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
