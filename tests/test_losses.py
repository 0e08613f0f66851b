"""Aggregations and reference KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo_lightning.batch import Gate
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import (
    KLEstimator,
    LossAggregation,
    ReferenceKL,
    Totals,
    policy_gradient_loss,
    surrogate_value,
)
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
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal((aggregation.coefficients(mask, totals) * loss).sum(), whole), "they are float32 in any case"
    finally:
        torch.set_default_dtype(torch.float32)
    textbook = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([r.mean() for r in rows]).mean(),
        "seq-mean-token-sum-norm": torch.stack([r.sum() / 7 for r in rows]).mean(),
    }
    torch.testing.assert_close(whole, textbook[kind], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "lengths", "expected"),
    [("token-mean", [4, 10], 0.303), ("seq-mean-token-mean", [4, 10], 0.0), ("token-mean", [7, 7], 0.0)],
)
def test_the_loss_of_a_rollouts_first_update(kind: str, lengths: list[int], expected: float) -> None:
    """All ratios are 1 and advantages add up to 0: docs/concepts.md says what is left of them."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    advantages = torch.tensor([[0.707], [-0.707]]).expand_as(mask)
    coefficients = LossAggregation(kind).coefficients(mask, Totals(mask.sum(), torch.tensor(2)))  # type: ignore[arg-type]
    loss = -surrogate_value(advantages, Gate(mask.float(), mask), coefficients)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


ESTIMATORS: list[KLEstimator] = ["k1", "k2", "k3", "k1+", "k3+"]


def test_reference_kl_values_and_derivatives() -> None:
    logp, reference = torch.tensor([0.60, 0.45]).log().requires_grad_(), torch.tensor([0.50, 0.55]).log()
    expected = VECTORS["kl_est"]
    gradients = {"k1": [1.0, 1.0], "k2": expected["dk2"], "k3": expected["dk3"], "k1+": expected["dk2"], "k3+": expected["dk2"]}
    for estimator in ESTIMATORS:
        value = ReferenceKL(0.1, estimator)(logp, reference)
        np.testing.assert_allclose(value.detach().numpy(), expected[estimator.removesuffix("+")], rtol=3e-6)
        (actual,) = torch.autograd.grad(value.sum(), logp)
        np.testing.assert_allclose(actual.numpy(), gradients[estimator], rtol=3e-6)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_kl_expectations(estimator: KLEstimator, seed: int) -> None:
    """Values and gradients expected when tokens come from pi, by enumerating a small vocabulary in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, generator=g, dtype=torch.float64).mul(2).requires_grad_()
    reference = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    # what is averaged over samples: their probability is no part of the graph
    expectation = (logp.exp().detach() * ReferenceKL(1.0, estimator)(logp, reference)).sum()
    (actual,) = torch.autograd.grad(expectation, logits, retain_graph=True)
    forward, backward = kl(logp, reference), kl(reference, logp)
    of_forward, of_backward = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (forward, backward))
    assert float((of_forward - of_backward).norm()) > 0.1, "directions that cannot be told apart test nothing"
    wanted = {"k1": torch.zeros(9, dtype=torch.float64), "k3": of_backward}.get(estimator, of_forward)
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)
    if estimator != "k2":
        torch.testing.assert_close(expectation, forward, rtol=1e-9, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([float("nan"), float("inf"), -float("inf"), 7e4]))
def test_what_padding_holds_changes_nothing(seed: int, garbage: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=g) < 0.6
    mask[0, 0] = True
    clean = torch.randn(4, 6, generator=g)
    advantages = torch.randn(4, 6, generator=g)
    coefficients = LossAggregation().coefficients(mask, Totals(mask.sum(), torch.tensor(4)))
    gate = Gate(weight=torch.rand(4, 6, generator=g) * mask, keep=mask)

    def loss_and_gradient(fill: float) -> tuple[torch.Tensor, ...]:
        logp = clean.masked_fill(~mask, fill).requires_grad_()
        filled = advantages.masked_fill(~mask, fill)
        loss = policy_gradient_loss(logp, filled, gate, coefficients)
        loss.backward()
        assert logp.grad is not None
        return loss.detach(), surrogate_value(filled, gate, coefficients), logp.grad[mask]

    for ours, expected in zip(loss_and_gradient(garbage), loss_and_gradient(0.0), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LossAggregation("mean"), "must be one of token-mean"),  # type: ignore[arg-type]
        (lambda: LossAggregation("seq-mean-token-sum-norm"), "horizon"),
        (lambda: LossAggregation("token-mean", 5), "horizon"),
        (lambda: LossAggregation("seq-mean-token-sum-norm", 0), "at least 1"),
        (lambda: ReferenceKL(0.0), "reference_kl: null"),
        (lambda: ReferenceKL(0.1, "k4"), r"k1, k2, k3, k1\+ or k3\+, got 'k4'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
