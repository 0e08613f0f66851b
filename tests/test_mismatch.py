"""Ratios that start at pi_old: corrections against the worked vectors, gates against textbook surrogates, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo_lightning.batch import RolloutBatch, TokenStats
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.mismatch import (
    MismatchCorrection,
    RecomputedBatch,
    TokenMask,
    TruncatedImportance,
    check_anchor,
    decoupled_gate,
    numbered,
)
from cppo_lightning.sequences import micro_batches
from cppo_lightning.trust_regions import CPPO, PPOClip
from tests.test_cppo import random_stats
from tests.worked import VECTORS

ICEPOP = TokenMask(0.5, 5.0)
# a factor as the papers write it, token by token
SLOW: dict[MismatchCorrection, Callable[[float], float]] = {
    TruncatedImportance(): lambda w: min(w, 2.0),
    TokenMask(): lambda w: w if w <= 2.0 else 0.0,
    ICEPOP: lambda w: w if 0.5 <= w <= 5.0 else 0.0,
}
NAMES = ["tis", "mis", "icepop"]


def make_batch(stats: TokenStats, old_logp: torch.Tensor) -> RecomputedBatch:
    rows = len(stats.mask)
    return RecomputedBatch(
        prompt_ids=torch.ones(rows, 1, dtype=torch.int64),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        response_ids=stats.response_ids,
        response_mask=stats.mask,
        rollout_logp=stats.rollout_logp,
        advantages=stats.advantages[:, 0],
        rewards=torch.zeros(rows),
        group=torch.zeros(rows, dtype=torch.int64),
        policy_version=torch.zeros(rows, dtype=torch.int64),
        old_logp=old_logp,
    )


def near(stats: TokenStats, seed: int) -> torch.Tensor:
    """log pi_old that differs from log mu by up to a factor of e^2, with garbage in the padding."""
    noise = torch.randn(stats.mask.shape, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    return torch.where(stats.mask, stats.rollout_logp + noise, torch.tensor(float("nan")))


@pytest.mark.parametrize(("correction", "key"), [*zip(SLOW, ["tis2", "mis2", "icepop"], strict=True)], ids=NAMES)
def test_worked_vectors(correction: MismatchCorrection, key: str) -> None:
    factor = correction(torch.tensor([VECTORS["mismatch"]["w"]]))
    np.testing.assert_allclose(factor[0].numpy(), VECTORS["mismatch"][key], rtol=1e-6)


@pytest.mark.parametrize("correction", SLOW, ids=NAMES)
def test_a_factor_at_its_bound_stays_and_an_overflow_is_finite(correction: MismatchCorrection) -> None:
    ratio = torch.tensor([[0.0, 0.5, 2.0, 5.0, float("inf")]])
    factor = correction(ratio)
    assert factor[0].tolist() == [SLOW[correction](float(w)) for w in ratio[0]]
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize("correction", SLOW, ids=NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_corrected_textbook_surrogate(correction: MismatchCorrection, seed: int) -> None:
    """sg[f(pi_old / mu)] min(r A, clip(r) A) with r = pi / pi_old, f applied token by token."""
    stats = random_stats(seed)
    mask, advantages, old = stats.mask, stats.advantages, near(stats, seed)
    clip = PPOClip()
    gate = decoupled_gate(clip, stats, make_batch(stats, old), correction)
    coefficients = LossAggregation().coefficients(mask, Totals(mask.sum(), torch.tensor(len(mask))))

    w = (old - stats.rollout_logp).double().exp()
    factor = torch.zeros_like(w)
    for b, t in mask.nonzero().tolist():
        factor[b, t] = SLOW[correction](float(w[b, t]))
    assert int((factor != w)[mask].sum()) > 10, "a correction that changes nothing tests nothing"
    logp = stats.logp.masked_fill(~mask, 0.0).requires_grad_()
    ratio = (logp - old.masked_fill(~mask, 0.0)).exp()
    clipped = ratio.clamp(1 - clip.eps_low, 1 + clip.eps_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages) * factor
    value = (objective * mask).sum() / mask.sum()
    (expected,) = torch.autograd.grad(-value, logp)
    (ours,) = torch.autograd.grad(policy_gradient_loss(logp, advantages, gate, coefficients), logp)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(surrogate_value(advantages, gate, coefficients), value.detach().float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gate.diagnostics["mismatch_weight"], factor.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(gate.keep, clip(replace(stats, rollout_logp=old)).keep)


@pytest.mark.parametrize("correction", [None, *SLOW], ids=["none", *NAMES])
def test_an_engine_that_agrees_changes_nothing(correction: MismatchCorrection | None) -> None:
    stats = random_stats(4)
    plain = PPOClip()(stats)
    gate = decoupled_gate(PPOClip(), stats, make_batch(stats, stats.rollout_logp), correction)
    assert torch.equal(gate.weight, plain.weight)
    assert torch.equal(gate.keep, plain.keep)
    assert torch.equal(gate.diagnostics["surrogate"], plain.diagnostics["surrogate"])


@pytest.mark.parametrize("correction", SLOW, ids=NAMES)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), garbage=st.sampled_from([float("nan"), float("inf"), -float("inf"), 7e4]))
def test_padding_and_neighbours_change_nothing(correction: MismatchCorrection, seed: int, garbage: float) -> None:
    stats = random_stats(seed, rows=4, width=9)
    old = near(stats, seed)
    fill = {name: getattr(stats, name).masked_fill(~stats.mask, garbage) for name in ("logp", "rollout_logp")}
    dirty = decoupled_gate(
        PPOClip(), replace(stats, **fill), make_batch(stats, old.masked_fill(~stats.mask, garbage)), correction
    )
    clean = decoupled_gate(PPOClip(), stats, make_batch(stats, old), correction)
    assert torch.equal(dirty.weight, clean.weight)
    assert bool(dirty.weight.isfinite().all())
    for row in range(4):
        cut = TokenStats(**{f.name: v[row : row + 1] for f in fields(stats) if (v := getattr(stats, f.name)) is not None})
        alone = decoupled_gate(PPOClip(), cut, make_batch(cut, old[row : row + 1]), correction)
        assert torch.equal(alone.weight, clean.weight[row : row + 1])


def plain(batch: RolloutBatch) -> RolloutBatch:
    return RolloutBatch(**{f.name: getattr(batch, f.name) for f in fields(RolloutBatch)})


@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 200), blanks=st.integers(0, 2))
def test_micro_batches_find_back_to_their_rows(seed: int, tokens: int, blanks: int) -> None:
    stats = random_stats(seed, rows=7, width=9)
    stats = replace(stats, mask=torch.arange(9) < stats.mask.sum(-1, keepdim=True))  # as ``collate`` makes it
    # a value of its own for every token, which goes where the token goes
    values = torch.arange(7 * 9).view(7, 9).float()
    whole = plain(make_batch(replace(stats, rollout_logp=values), values))
    parts = [part.batch for part in micro_batches(numbered(whole), tokens)]
    parts += [parts[0].blank()] * blanks
    back = RecomputedBatch.assemble(whole, parts, [part.rollout_logp * part.response_mask for part in parts])
    assert back.old_logp is not None
    assert torch.equal(back.old_logp[stats.mask], values[stats.mask])
    assert all(getattr(back, f.name) is getattr(whole, f.name) for f in fields(RolloutBatch))
    for part in (found.batch for found in micro_batches(back, tokens)):
        assert isinstance(part, RecomputedBatch)
        assert part.old_logp is not None
        assert torch.equal(part.old_logp[part.response_mask], part.rollout_logp[part.response_mask])
    blank = back.blank()
    assert blank.old_logp is not None
    assert blank.old_logp.shape == (1, 1)


def test_a_batch_without_rows_stays_one() -> None:
    stats = random_stats(0)
    empty = plain(make_batch(stats, stats.logp)).select(torch.tensor([], dtype=torch.int64))
    blank = numbered(empty).blank()
    back = RecomputedBatch.assemble(empty, [blank], [torch.zeros(1, 1)])
    assert back.old_logp is not None
    assert back.old_logp.shape == (0, 0)


def test_a_batch_that_nobody_recomputed_is_refused() -> None:
    stats = random_stats(0)
    with pytest.raises(TypeError, match=r"anchor is recomputed, but the RolloutBatch was not passed to RLVRModule\.recompute"):
        decoupled_gate(PPOClip(), stats, plain(make_batch(stats, stats.logp)), None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: check_anchor(PPOClip(), "rollout", TruncatedImportance()),
            r"model\.mismatch = TruncatedImportance\(cap=2\.0\) .* pi / mu and hold the correction already; set .* null, or",
        ),
        (
            lambda: check_anchor(CPPO(BinaryTV()), "recomputed", None),
            r"model\.anchor = recomputed puts pi_old in the place of mu, which CPPO is not defined for: .* set model\.anchor",
        ),
        (lambda: check_anchor(PPOClip(), "old", None), r"model\.anchor must be rollout or recomputed, got 'old'"),  # type: ignore[arg-type]
        (lambda: TruncatedImportance(0), r"TruncatedImportance\.cap must be above 0 .* got 0"),
        (lambda: TokenMask(2.0, 2.0), r"TokenMask needs 0 <= low < high .* got low 2\.0 and high 2\.0"),
        (lambda: TokenMask(-0.1), r"got low -0\.1"),
    ],
)
def test_what_would_be_wrong_is_refused(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


def test_what_goes_together_is_not_refused() -> None:
    check_anchor(CPPO(), "rollout", None)
    check_anchor(PPOClip(), "rollout", None)
    check_anchor(PPOClip(), "recomputed", None)
    check_anchor(PPOClip(), "recomputed", ICEPOP)
