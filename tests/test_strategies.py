"""Every strategy of the package against its slow oracle, the identities between them, and what no strategy may depend on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppo_lightning import trust_regions
from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.divergences import BinaryKL, BinaryTV, Divergence, SampledK2, SampledK3, TopKKL, TopKTV, captured_mass
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss
from cppo_lightning.trust_regions import (
    CISPO,
    CPPO,
    DPPO,
    GSPO,
    SAPO,
    TRM,
    FixedHorizonCPPO,
    Intersection,
    MinPRO,
    PPOClip,
    ShuffledCPPO,
    SoftCPPO,
    TrustRegion,
)
from tests import oracles
from tests.oracles import Decision, Token

GARBAGE = (math.nan, math.inf, -math.inf, 7e4)
# of a decision: sums of some ten float32 numbers below 2
TOLERANCE = 5e-6

Build = Callable[[int], TrustRegion]  # from K
Oracle = Callable[[list[Token], int], list[Decision]]

STRATEGIES: dict[str, tuple[Build, Oracle]] = {
    "ppo": (lambda k: PPOClip(0.2, 0.2), lambda r, k: oracles.ppo_clip(r, 0.2, 0.2)),
    "grpo": (lambda k: PPOClip(), lambda r, k: oracles.ppo_clip(r, 0.2, 0.28)),
    "dual": (lambda k: PPOClip(0.2, 0.28, 1.5), lambda r, k: oracles.ppo_clip(r, 0.2, 0.28, 1.5)),
    "dppo": (lambda k: DPPO(TopKTV(k)), lambda r, k: oracles.dppo(r, oracles.tv(k), 0.15)),
    "dppo-binary": (lambda k: DPPO(BinaryTV(), 0.1), lambda r, k: oracles.dppo(r, oracles.tv(0), 0.1)),
    "dppo-kl": (lambda k: DPPO(TopKKL(k), 0.05), lambda r, k: oracles.dppo(r, oracles.kl(k), 0.05)),
    "dppo-binary-kl": (lambda k: DPPO(BinaryKL(), 0.05), lambda r, k: oracles.dppo(r, oracles.kl(0), 0.05)),
    "dppo-capped": (lambda k: DPPO(TopKTV(k), 0.3, 1.2), lambda r, k: oracles.dppo(r, oracles.tv(k), 0.3, 1.2)),
    "trm-max": (lambda k: TRM(divergence=TopKKL(k)), lambda r, k: oracles.trm(r, oracles.kl(k), "max", 0.05)),
    "trm-avg": (lambda k: TRM("mean", divergence=TopKKL(k)), lambda r, k: oracles.trm(r, oracles.kl(k), "mean", 0.001)),
    "trm-k2": (lambda k: TRM("max", 0.3, SampledK2()), lambda r, k: oracles.trm(r, oracles.k2, "max", 0.3)),
    "trm-max-avg": (
        lambda k: Intersection([TRM("max", 0.1, TopKKL(k)), TRM("mean", 0.01, SampledK3())]),
        lambda r, k: oracles.both(oracles.trm(r, oracles.kl(k), "max", 0.1), oracles.trm(r, oracles.k3, "mean", 0.01)),
    ),
    "cispo-trm": (
        lambda k: Intersection([CISPO(0.0, 1.5), TRM("mean", 0.05, TopKTV(k))]),
        lambda r, k: oracles.both(oracles.cispo(r, 0.0, 1.5), oracles.trm(r, oracles.tv(k), "mean", 0.05)),
    ),
    "cispo": (lambda k: CISPO(), lambda r, k: oracles.cispo(r, 0.0, 5.0)),
    "cispo-two-sided": (lambda k: CISPO(0.8, 1.28), lambda r, k: oracles.cispo(r, 0.8, 1.28)),
    "none": (lambda k: CISPO(0.0, math.inf), lambda r, k: oracles.cispo(r, 0.0, math.inf)),
    "minpro": (lambda k: MinPRO(), lambda r, k: oracles.minpro(r, 0.0, 5.0)),
    "minpro-two-sided": (lambda k: MinPRO(0.8, 1.28), lambda r, k: oracles.minpro(r, 0.8, 1.28)),
    "gspo": (lambda k: GSPO(), lambda r, k: oracles.gspo(r, 3e-4, 4e-4)),
    "gspo-wide": (lambda k: GSPO(0.1, 0.2), lambda r, k: oracles.gspo(r, 0.1, 0.2)),
    "sapo": (lambda k: SAPO(), lambda r, k: oracles.sapo(r, 1.0, 1.05)),
    "cppo": (lambda k: CPPO(TopKTV(k)), lambda r, k: oracles.cppo(r, oracles.tv(k), 0.15, 0.02, 0.8, True)),
    "cppo-fixed": (
        lambda k: CPPO(BinaryTV(), 0.2, 0.05, 0.5, adaptive=False),
        lambda r, k: oracles.cppo(r, oracles.tv(0), 0.2, 0.05, 0.5, False),
    ),
    "cppo-kl": (
        lambda k: CPPO(TopKKL(k), 0.1, 0.002, adaptive=False),
        lambda r, k: oracles.cppo(r, oracles.kl(k), 0.1, 0.002, 0.8, False),
    ),
}
# no token that moves back to mu is ever dropped by these
TOWARD_KEPT = [name for name in STRATEGIES if name in ("ppo", "grpo") or name.startswith(("dppo", "cppo"))]
TOWARD_KEPT += ["cppo-soft", "cppo-shuffled", "cppo-horizon"]
DROP_NOTHING = ("cispo", "cispo-two-sided", "none", "minpro", "minpro-two-sided", "sapo")
# the variants of CPPO have oracles of their own, in oracles_cppo.py
REGIONS: dict[str, Build] = {name: build for name, (build, _) in STRATEGIES.items()} | {
    "cppo-soft": lambda k: SoftCPPO(TopKTV(k)),
    "cppo-shuffled": lambda k: ShuffledCPPO(TopKTV(k)),
    "cppo-horizon": lambda k: FixedHorizonCPPO(TopKTV(k), horizon=6),
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)
every_region = pytest.mark.parametrize("name", REGIONS)
property_test = settings(max_examples=60, derandomize=True, deadline=None)


@dataclass(frozen=True)
class Batch:
    """Statistics with K entries, and the full next-token distributions behind them, ``[B, T, V]``."""

    stats: TokenStats
    mu: Tensor
    pi: Tensor
    k: int


def make_batch(seed: int, rows: int, width: int, vocabulary: int, k: int, spread: float, drift: float, garbage: float) -> Batch:
    """Responses of random length with untrained tokens inside; ``garbage`` and id -100 wherever a token is not trainable."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, vocabulary, generator=g) * spread
    shift = torch.randn(rows, width, vocabulary, generator=g) * drift * torch.rand(rows, 1, 1, generator=g)
    mu, pi = logits.log_softmax(-1), (logits + shift).log_softmax(-1)
    ids = mu.exp().flatten(0, 1).multinomial(1, generator=g).view(rows, width)
    top = mu.topk(k).indices
    lengths = torch.randint(1, width + 1, (rows, 1), generator=g)
    mask = (torch.arange(width) < lengths) & (torch.rand(rows, width, generator=g) > 0.15)
    mask[:, 0] |= ~mask.any(-1)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, width)

    def spoilt(values: Tensor) -> Tensor:
        return torch.where(mask.view(mask.shape + (1,) * (values.dim() - 2)), values, garbage)

    stats = TokenStats(
        response_ids=ids.masked_fill(~mask, -100),
        logp=spoilt(pi.gather(-1, ids[..., None]).squeeze(-1)),
        rollout_logp=spoilt(mu.gather(-1, ids[..., None]).squeeze(-1)),
        advantages=spoilt(advantages),
        mask=mask,
        topk_ids=top.masked_fill(~mask[..., None], -100),
        topk_rollout_logp=spoilt(mu.gather(-1, top)),
        topk_logp=spoilt(pi.gather(-1, top)),
    )
    return Batch(stats, mu, pi, k)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    vocabulary = draw(st.integers(2, 12))
    return make_batch(
        seed=draw(st.integers(0, 2**31)),
        rows=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 12)),
        vocabulary=vocabulary,
        k=draw(st.integers(1, vocabulary)),
        spread=draw(st.sampled_from((0.1, 1.0, 3.0, 30.0))),
        drift=draw(st.sampled_from((0.0, 1e-3, 0.3, 3.0))),
        garbage=draw(st.sampled_from(GARBAGE)),
    )


@lru_cache(maxsize=1)
def thousand() -> list[tuple[Batch, list[list[Token]]]]:
    """1,000 small batches with K from 1 to V, and their tokens for the oracles."""
    made = []
    for seed in range(1000):
        r = random.Random(seed)
        vocabulary = r.randint(2, 7)
        drift = r.choice((0.02, 0.1, 0.3, 1.0, 2.0))
        shape = {"rows": r.randint(1, 4), "width": r.randint(1, 12), "vocabulary": vocabulary, "k": r.randint(1, vocabulary)}
        batch = make_batch(seed, **shape, spread=r.choice((0.5, 1.5, 3.0)), drift=drift, garbage=r.choice(GARBAGE))
        made.append((batch, oracles.tokens(batch.stats)))
    return made


def test_every_trust_region_of_the_package_is_here() -> None:
    assert {type(build(1)).__name__ for build in REGIONS.values()} == set(trust_regions.__all__) - {"TrustRegion"}


@every_strategy
def test_equals_a_loop_over_tokens(name: str) -> None:
    build, oracle = STRATEGIES[name]
    ours: dict[str, list[Tensor]] = {"keep": [], "weight": [], "value": []}
    expected: list[Decision] = []
    for batch, responses in thousand():
        stats = batch.stats
        gate = build(batch.k)(stats)
        value = gate.diagnostics.get("surrogate", gate.weight * stats.advantages)
        for key, tensor in (("keep", gate.keep), ("weight", gate.weight), ("value", value)):
            ours[key].append(tensor[stats.mask])
        assert gate.weight.dtype == torch.float32
        assert not gate.keep[~stats.mask].any()
        assert not gate.weight[~stats.mask].any()
        expected += [decision for response in responses for decision in oracle(response, batch.k)]
    keep, weight, value = (torch.cat(ours[key]).numpy() for key in ("keep", "weight", "value"))
    certain = np.array([d.margin for d in expected]) > TOLERANCE
    assert certain.mean() > 0.995
    np.testing.assert_array_equal(keep[certain], np.array([d.keep for d in expected])[certain])
    # 1e-5: float32 of a ratio, some ten of which are averaged or multiplied
    np.testing.assert_allclose(weight[certain], np.array([d.weight for d in expected])[certain], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value[certain], np.array([d.value for d in expected])[certain], rtol=1e-5, atol=1e-6)
    dropped = 1 - keep.mean()
    assert dropped == 0 if name in DROP_NOTHING else 0.02 < dropped < 0.98, "the batches do not try the decision"


# ---- identities ---------------------------------------------------------------------------------------------------------


@property_test
@given(batches(), st.sampled_from((0.01, 0.15, 0.4)))
def test_cppo_without_position_weight_and_budget_is_dppo(batch: Batch, delta: float) -> None:
    for divergence in (TopKTV(batch.k), BinaryTV(), TopKKL(batch.k)):
        cppo = CPPO(divergence, delta, delta_b=None, w_min=1.0)(batch.stats)
        huge = CPPO(divergence, delta, delta_b=1e9, w_min=1.0, adaptive=False)(batch.stats)
        dppo = DPPO(divergence, delta)(batch.stats)
        for gate in (cppo, huge):
            assert torch.equal(gate.keep, dppo.keep)
            assert torch.equal(gate.weight, dppo.weight)


@dataclass(frozen=True)
class RatioDistance(Divergence):
    """|rho - 1|, under which DPPO is PPO."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.ratio - 1).abs()


@property_test
@given(batches(), st.sampled_from((0.125, 0.25, 0.5)))  # exact in binary, so that both thresholds are the same number
def test_dppo_on_the_ratio_is_ppo(batch: Batch, eps: float) -> None:
    dppo, ppo = DPPO(RatioDistance(), eps)(batch.stats), PPOClip(eps, eps)(batch.stats)
    assert torch.equal(dppo.keep, ppo.keep)
    assert torch.equal(dppo.weight, ppo.weight)


@property_test
@given(batches())
def test_binary_top_k_and_full_divergences_are_ordered(batch: Batch) -> None:
    stats, vocabulary = batch.stats, batch.mu.shape[-1]
    top = batch.mu.topk(vocabulary).indices
    whole = replace(stats, topk_ids=top, topk_rollout_logp=batch.mu.gather(-1, top), topk_logp=batch.pi.gather(-1, top))
    mu, pi = batch.mu.double(), batch.pi.double()
    full_tv = (0.5 * (mu.exp() - pi.exp()).abs().sum(-1)).float()
    full_kl = (mu.exp() * (mu - pi)).sum(-1).float()
    # in float32 the rest 1 - sum p is off by some 2e-7, which KL multiplies by mu / pi of the rest
    amplified = 1e-6 * (1 + (mu - pi).amax(-1).exp()).float()
    for binary, top_k, full, slack in (
        (BinaryTV(), TopKTV, full_tv, torch.tensor(1e-6)),
        (BinaryKL(), TopKKL, full_kl, amplified),
    ):
        ladder = [binary(whole), *(top_k(k)(whole) for k in range(1, vocabulary + 1))]
        if float(pi.min()) > math.log(1e-6):  # below float32's resolution of the rest, a bin of one's own tells more
            assert all(bool((coarse <= fine + slack).all()) for coarse, fine in pairwise(ladder))
            torch.testing.assert_close(ladder[-1][stats.mask], full[stats.mask], rtol=1e-5, atol=2e-6)
        assert all(bool((d <= full.masked_fill(~stats.mask, 0.0) + slack).all()) for d in ladder)
    mass = captured_mass(whole, batch.k)
    assert bool((mass <= captured_mass(whole) + 1e-6).all())
    torch.testing.assert_close(captured_mass(whole), stats.mask.float(), rtol=0, atol=1e-6)


@every_region
@property_test
@given(batch=batches())
def test_on_policy_everything_is_kept_at_weight_one(name: str, batch: Batch) -> None:
    same = replace(batch.stats, logp=batch.stats.rollout_logp, topk_logp=batch.stats.topk_rollout_logp)
    gate = REGIONS[name](batch.k)(same)
    assert torch.equal(gate.keep, same.mask)
    assert torch.equal(gate.weight, same.mask.float())
    if "divergence" in gate.diagnostics:
        assert not gate.diagnostics["divergence"].any()


@pytest.mark.parametrize("name", TOWARD_KEPT)
@property_test
@given(batch=batches())
def test_a_token_that_moves_back_is_kept(name: str, batch: Batch) -> None:
    stats = batch.stats
    gate = REGIONS[name](batch.k)(stats)
    toward = stats.mask & (stats.advantages.masked_fill(~stats.mask, 0.0) * (stats.ratio - 1) <= 0)
    assert torch.equal(gate.diagnostics["toward"], toward)
    assert bool(gate.keep[toward].all())


@property_test
@given(batches())
def test_gspo_keeps_a_response_that_moves_back_as_a_whole(batch: Batch) -> None:
    stats = batch.stats
    gate = GSPO()(stats)
    for row, response in enumerate(oracles.tokens(stats)):
        drift = sum(token.pi - token.mu for token in response) / len(response)
        assert bool(gate.diagnostics["rejected"][row]) != bool(gate.keep[row].any())
        if response[0].advantage * drift <= -1e-6:
            assert torch.equal(gate.keep[row], stats.mask[row])


# ---- what nothing may depend on -----------------------------------------------------------------------------------------


def moved(stats: TokenStats, order: list[int], columns: list[int], width: int, garbage: float) -> TokenStats:
    """Rows in another order, column t at ``columns[t]`` of ``width``, and other garbage wherever nothing is trained."""
    mask = torch.zeros(len(order), width, dtype=torch.bool)
    mask[:, columns] = stats.mask[order]

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        fill = garbage if values.is_floating_point() else -100
        wide = values.new_full((len(order), width, *values.shape[2:]), fill)
        wide[:, columns] = values[order]
        return wide.masked_fill(~mask.view(mask.shape + (1,) * (values.dim() - 2)), fill)

    return TokenStats(**{name: mask if name == "mask" else spread(value) for name, value in vars(stats).items()})  # type: ignore[arg-type]


def assert_same(one: Gate, other: Gate, own: Tensor, other_own: Tensor, order: list[int]) -> None:
    """Bit for bit, on the trainable tokens and per response."""
    assert set(one.diagnostics) == set(other.diagnostics)
    pairs = {key: (value, other.diagnostics[key]) for key, value in one.diagnostics.items()}
    pairs |= {"weight": (one.weight, other.weight), "keep": (one.keep, other.keep)}
    for key, (a, b) in pairs.items():
        if a.dim() == 2:
            assert torch.equal(a[order][own[order]], b[other_own]), key
        else:
            assert torch.equal(a[order], b), key


@every_region
@property_test
@given(batch=batches(), data=st.data())
def test_padding_order_and_company_change_nothing(name: str, batch: Batch, data: st.DataObject) -> None:
    stats, region = batch.stats, REGIONS[name](batch.k)
    rows, width = stats.mask.shape
    gate = region(stats)
    order = data.draw(st.permutations(range(rows)))
    wide = width + data.draw(st.integers(0, 9))
    columns = sorted(data.draw(st.permutations(range(wide)))[:width])
    other = moved(stats, order, columns, wide, data.draw(st.sampled_from(GARBAGE)))
    assert_same(gate, region(other), stats.mask, other.mask, order)
    alone = moved(stats, order[:1], columns, wide, 0.0)
    assert_same(gate, region(alone), stats.mask, alone.mask, order[:1])


@every_region
@property_test
@given(batch=batches())
def test_garbage_gives_nothing_that_is_not_finite(name: str, batch: Batch) -> None:
    untrained = replace(batch.stats, mask=torch.zeros_like(batch.stats.mask))  # a row of padding alone, as of a blank batch
    for stats in (batch.stats, moved(untrained, [0], list(range(untrained.mask.shape[1])), untrained.mask.shape[1], math.nan)):
        gate = REGIONS[name](batch.k)(stats)
        for key, value in {"weight": gate.weight, "keep": gate.keep, **gate.diagnostics}.items():
            assert bool(value.isfinite().all()), key
            if value.dim() == 2:
                assert not value[~stats.mask].any(), key


# ---- gradients ----------------------------------------------------------------------------------------------------------


def masked_ratio_surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
    """sum_t M_t rho_t A_t: DPPO, TRM, CPPO."""
    return decisions * rho * advantages


def capped_score_surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
    """DPPO Eq. 23 with C = 1.2."""
    return decisions * rho.clamp(max=1.2).detach() * advantages * logp


def clip_surrogate(low: float, high: float, dual: float = math.inf) -> Callable[..., Tensor]:
    def surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
        value = torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)
        return torch.where(advantages < 0, torch.maximum(value, dual * advantages), value)

    return surrogate


def cispo_surrogate(low: float, high: float) -> Callable[..., Tensor]:
    return lambda rho, logp, advantages, decisions: rho.clamp(low, high).detach() * advantages * logp


def minpro_surrogate(low: float, high: float) -> Callable[..., Tensor]:
    """One response ``[T]`` at a time."""

    def surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
        prefix = torch.stack([rho[:t].min() if t else torch.ones(()) for t in range(len(rho))])
        return (prefix * rho).clamp(low, high).detach() * advantages * logp

    return surrogate


def gspo_surrogate(low: float, high: float) -> Callable[..., Tensor]:
    """One response ``[T]`` at a time; its one value, so that its mean over tokens is the objective."""

    def surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
        whole = rho.log().mean().exp()
        return torch.minimum(whole * advantages, whole.clamp(1 - low, 1 + high) * advantages)

    return surrogate


def sapo_surrogate(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
    tau = torch.where(advantages > 0, 1.0, 1.05)
    return 4 / tau * torch.sigmoid(tau * (rho - 1)) * advantages


def cispo_within_trm(rho: Tensor, logp: Tensor, advantages: Tensor, decisions: Tensor) -> Tensor:
    return decisions * rho.clamp(0.0, 1.5).detach() * advantages * logp


SURROGATES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(STRATEGIES, masked_ratio_surrogate),
    "ppo": clip_surrogate(0.2, 0.2),
    "grpo": clip_surrogate(0.2, 0.28),
    "dual": clip_surrogate(0.2, 0.28, 1.5),
    "dppo-capped": capped_score_surrogate,
    "cispo-trm": cispo_within_trm,
    "cispo": cispo_surrogate(0.0, 5.0),
    "cispo-two-sided": cispo_surrogate(0.8, 1.28),
    "none": cispo_surrogate(0.0, math.inf),
    "minpro": minpro_surrogate(0.0, 5.0),
    "minpro-two-sided": minpro_surrogate(0.8, 1.28),
    "gspo": gspo_surrogate(3e-4, 4e-4),
    "gspo-wide": gspo_surrogate(0.1, 0.2),
    "sapo": sapo_surrogate,
}


@pytest.mark.parametrize("seed", range(3))
@every_strategy
def test_gradient_is_that_of_the_textbook_surrogate(name: str, seed: int) -> None:
    """Autograd of the surrogate as its paper writes it, masks taken from the oracles; GSPO's mean is over responses."""
    build, oracle = STRATEGIES[name]
    drift = 0.1 if name == "trm-avg" else 0.6
    batch = make_batch(seed, rows=8, width=20, vocabulary=8, k=4, spread=1.0, drift=drift, garbage=0.0)
    stats, responses = batch.stats, oracles.tokens(batch.stats)
    mask, advantages = stats.mask, stats.advantages
    totals = Totals(mask.sum(), torch.tensor(len(mask)))
    per_response = name.startswith("gspo")
    logp = stats.logp.clone().requires_grad_()
    textbook = torch.zeros(())
    for row, response in enumerate(responses):
        decisions = oracle(response, batch.k)
        assert min(d.margin for d in decisions) > 1e-6, "take another seed: float32 cannot decide this one"
        own = mask[row]
        rho = (logp[row, own] - stats.rollout_logp[row, own]).exp()
        keep = torch.tensor([float(d.keep) for d in decisions])
        values = SURROGATES[name](rho, logp[row, own], advantages[row, own], keep)
        textbook = textbook - (values.mean() / len(mask) if per_response else values.sum() / totals.tokens)
    (expected,) = torch.autograd.grad(textbook, logp)

    kind = "seq-mean-token-mean" if per_response else "token-mean"
    coefficients = LossAggregation(kind).coefficients(mask, totals)
    ours = logp.detach().requires_grad_()
    (actual,) = torch.autograd.grad(policy_gradient_loss(ours, advantages, build(batch.k)(stats), coefficients), ours)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-8)
    assert bool(expected.any()), "a gradient of 0 everywhere tests nothing"
