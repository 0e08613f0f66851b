"""The bound and its corollaries, on policies small enough to enumerate.  xi = 1 unless a test says otherwise."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cppo_lightning import theory
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.theory import TabularPolicy
from cppo_lightning.trust_regions import CPPO
from tests.worked import from_probabilities

SIZES = list(product((2, 3, 4), (1, 2, 3, 4, 5)))  # (V, T)
PAIRS = 67  # of each size, 1,005 in all


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def random_policy(g: torch.Generator, v: int, horizon: int, pairs: int = PAIRS, scale: float = 2.0) -> TabularPolicy:
    tables = [torch.randn(pairs, v**t, v, generator=g, dtype=torch.float64) * scale for t in range(horizon)]
    return TabularPolicy.from_logits(tables)


def cppo_weights(horizon: int, w_min: float) -> Tensor:
    """The weights of the class that trains."""
    return CPPO(w_min=w_min).position_weight(torch.ones(1, horizon, dtype=torch.bool))[0].double()


def pair_of(mu: TabularPolicy, pi: TabularPolicy, index: int) -> tuple[TabularPolicy, TabularPolicy]:
    return tuple(TabularPolicy(tuple(table[index] for table in policy.log_probs)) for policy in (mu, pi))  # type: ignore[return-value]


def within_constraints(
    mu: TabularPolicy, toward: TabularPolicy, weights: Tensor, thresholds: Tensor, allowed: Tensor, share: list[Tensor]
) -> TabularPolicy:
    """Mixtures of mu with ``toward`` that take at each prefix ``share`` of what the premises leave there (1: all of it).

    ``weights`` and ``thresholds`` are [N, T]; ``allowed`` is [N, T], what w D may add up to over the first m tokens.
    """
    tables, spent = [], torch.zeros_like(weights[:, :1])  # [N, V^t]
    for t, (m, p) in enumerate(zip(mu.log_probs, toward.log_probs, strict=True)):
        w = weights[:, t, None]
        room = torch.minimum(thresholds[:, t, None], allowed[:, t, None] - spent) / w
        distance = 0.5 * (m.exp() - p.exp()).abs().sum(-1)
        mix = (share[t] * room / distance).clamp(0, 1)
        tables.append(torch.lerp(m.exp(), p.exp(), mix[..., None]).log())
        spent = (spent + w * mix * distance).repeat_interleave(mu.vocabulary, -1)
    return TabularPolicy.from_logits(tables)


@dataclass(frozen=True)
class Toy:
    """N pairs of one size that meet Theorem 1's premises for the [N] or [N, T] settings given."""

    mu: TabularPolicy
    pi: TabularPolicy
    weights: Tensor
    thresholds: Tensor
    delta: Tensor
    delta_b: Tensor
    w_min: Tensor

    def bound(self, rewards: Tensor, slack: Tensor | float = 0.0, **settings: object) -> theory.ImprovementBound:
        return theory.improvement_bound(
            self.mu,
            self.pi,
            rewards,
            self.weights,
            self.thresholds,
            self.delta_b,
            slack,
            **settings,  # type: ignore[arg-type]
        )


def feasible_pairs(v: int, horizon: int, seed: int, kind: str) -> Toy:
    """``kind``: "uniform" (Cor. 6, c = w delta), "implemented" (Cor. 7, c = delta) or "eq8" (the same with its slack)."""
    g = generator(seed)
    mu, toward = random_policy(g, v, horizon), random_policy(g, v, horizon)
    delta = 0.02 + 0.4 * uniform(g, PAIRS)
    delta_b = delta * (0.05 + 0.95 * uniform(g, PAIRS))
    w_min = 0.3 + 0.7 * uniform(g, PAIRS)
    weights = torch.stack([cppo_weights(horizon, float(w)) for w in w_min])
    thresholds = weights * delta[:, None] if kind == "uniform" else delta[:, None].expand_as(weights).clone()
    allowed = delta_b[:, None] * weights.cumsum(-1)
    if kind == "eq8":
        allowed = delta[:, None] + allowed - delta_b[:, None] * weights  # delta + delta_b W_{t-1}
    else:
        allowed[:, -1] = math.inf  # the last token is under its threshold alone
    # a third of the prefixes go to the limit, so that the premises are met with equality too
    share = [(1.5 * uniform(g, PAIRS, v**t)).clamp(max=1) for t in range(horizon)]
    pi = within_constraints(mu, toward, weights, thresholds, allowed, share)
    return Toy(mu, pi, weights, thresholds, delta, delta_b, w_min)


# ---------------------------------------------------------------- the oracle: loops over explicit sequences, plain floats


@dataclass(frozen=True)
class Oracle:
    """The same quantities for one pair, from dictionaries keyed by tuples of tokens."""

    mu: dict[tuple[int, ...], list[float]]
    pi: dict[tuple[int, ...], list[float]]
    rewards: dict[tuple[int, ...], float]
    v: int
    horizon: int

    @classmethod
    def of(cls, mu: TabularPolicy, pi: TabularPolicy, rewards: Tensor) -> Oracle:
        v, horizon = mu.vocabulary, mu.horizon
        prefixes = [list(product(range(v), repeat=t)) for t in range(horizon + 1)]

        def table(policy: TabularPolicy) -> dict[tuple[int, ...], list[float]]:
            rows = zip(prefixes[:-1], policy.log_probs, strict=True)
            return {s: logs.exp().tolist() for level, table in rows for s, logs in zip(level, table, strict=True)}

        return cls(table(mu), table(pi), dict(zip(prefixes[-1], rewards.tolist(), strict=True)), v, horizon)

    def prob(self, policy: dict[tuple[int, ...], list[float]], y: tuple[int, ...]) -> float:
        return math.prod(policy[y[:t]][token] for t, token in enumerate(y))

    def ratio(self, y: tuple[int, ...], first: int, last: int) -> float:
        """rho_{first:last}, 1-based and inclusive."""
        return math.prod(self.pi[y[: t - 1]][y[t - 1]] / self.mu[y[: t - 1]][y[t - 1]] for t in range(first, last + 1))

    def expected(self, policy: dict[tuple[int, ...], list[float]]) -> float:
        return sum(self.prob(policy, y) * r for y, r in self.rewards.items())

    def surrogate(self) -> float:
        ts = range(1, self.horizon + 1)
        return sum(self.prob(self.mu, y) * r * sum(self.ratio(y, t, t) - 1 for t in ts) for y, r in self.rewards.items())

    def integrand(self, y: tuple[int, ...]) -> float:
        ts = range(1, self.horizon + 1)
        return sum((self.ratio(y, t, t) - 1) * (1 - self.ratio(y, t + 1, self.horizon)) for t in ts)

    def residual(self) -> float:
        return sum(self.prob(self.mu, y) * r * self.integrand(y) for y, r in self.rewards.items())

    def divergence(self, prefix: tuple[int, ...]) -> float:
        return 0.5 * sum(abs(p - m) for p, m in zip(self.pi[prefix], self.mu[prefix], strict=True))

    def level(self, t: int) -> Iterator[tuple[int, ...]]:
        return product(range(self.v), repeat=t - 1)

    def premises(self, weights: list[float], thresholds: list[float], delta_b: float, slack: float) -> tuple[bool, bool]:
        tokens = budget = True
        for y in self.rewards:
            spent = allowed = 0.0
            for t in range(1, self.horizon + 1):
                z = weights[t - 1] * self.divergence(y[: t - 1])
                spent, allowed = spent + z, allowed + weights[t - 1]
                tokens &= z <= thresholds[t - 1] + 1e-12
                budget &= t == self.horizon or spent <= slack + delta_b * allowed + 1e-12
        return tokens, budget


@pytest.mark.parametrize(("v", "horizon"), [(2, 1), (2, 3), (3, 2), (3, 3), (4, 2), (2, 5)])
def test_every_function_equals_a_sum_over_explicit_sequences(v: int, horizon: int) -> None:
    g = generator(v * 10 + horizon)
    mus, pis = random_policy(g, v, horizon, 4), random_policy(g, v, horizon, 4)
    rewards = 2 * uniform(g, 4, v**horizon) - 1
    met = []
    for i in range(4):
        (mu, pi), oracle = pair_of(mus, pis, i), Oracle.of(*pair_of(mus, pis, i), rewards[i])
        ts = range(1, horizon + 1)
        assert float(theory.expected_reward(pis, rewards)[i]) == pytest.approx(oracle.expected(oracle.pi), abs=1e-13)
        assert float(theory.surrogate(mus, pis, rewards)[i]) == pytest.approx(oracle.surrogate(), abs=1e-12)
        assert float(theory.residual(mus, pis, rewards)[i]) == pytest.approx(oracle.residual(), abs=1e-12)
        divergences = theory.total_variation(mu, pi)
        for t in ts:
            assert divergences[t - 1].tolist() == pytest.approx([oracle.divergence(s) for s in oracle.level(t)], abs=1e-14)
        means = [sum(oracle.prob(oracle.mu, s) * oracle.divergence(s) for s in oracle.level(t)) for t in ts]
        assert theory.mean_divergence(mu, pi).tolist() == pytest.approx(means, abs=1e-14)
        limits = [max(oracle.divergence(s) for s in oracle.level(t)) for t in ts]
        assert theory.max_divergence(mu, pi).tolist() == pytest.approx(limits, abs=1e-14)
        hardest = theory.hardest_rewards(mu, pi, xi=2.0)
        assert hardest.tolist() == [2.0 * math.copysign(bool(x), x) for x in map(oracle.integrand, oracle.rewards)]

        suffixes = {
            theory.suffix_sum: [sum(limits[t:]) for t in ts],
            theory.suffix_linear: [max(limits) * (horizon - t) for t in ts],
            theory.suffix_product: [1 - math.prod(1 - x for x in limits[t:]) for t in ts],
        }
        for suffix, expected in suffixes.items():
            bounds = suffix(theory.max_divergence(mu, pi))
            assert bounds.tolist() == pytest.approx(expected, abs=1e-14)
            total = 4 * 0.7 * sum(u * s for u, s in zip(means, expected, strict=True))
            assert float(theory.residual_bound(theory.mean_divergence(mu, pi), bounds, xi=0.7)) == pytest.approx(
                total, rel=1e-12
            )

        # settings about as large as what they limit, so that premises fail for some of the pairs
        weights, scale = cppo_weights(horizon, 0.6), 0.9 + 0.05 * i
        thresholds, delta_b, slack = torch.full((horizon,), scale, dtype=torch.float64), scale * 0.5, 0.1 * i
        bound = theory.improvement_bound(mu, pi, rewards[i], weights, thresholds, delta_b, slack)
        expected_premises = oracle.premises(weights.tolist(), thresholds.tolist(), delta_b, slack)
        assert (bool(bound.thresholds_met), bool(bound.budget_met)) == expected_premises
        met.append(expected_premises)
        l_max = max(c / w for c, w in zip(thresholds.tolist(), weights.tolist(), strict=True))
        penalty = 2 * horizon * (horizon - 1) * l_max * delta_b + slack * 4 * l_max * (horizon - 1) / float(weights[0])
        assert float(bound.penalty) == pytest.approx(penalty, rel=1e-12)
        assert float(bound.value) == pytest.approx(oracle.surrogate() - penalty, abs=1e-12)
        assert bound.value.shape == bound.premises_hold.shape == ()
    if horizon > 1:
        assert {True, False} == {both for pair in met for both in pair}, "premises that are all alike test nothing"


def test_identity_on_1000_pairs() -> None:
    worst, residuals = 0.0, []
    for seed, (v, horizon) in enumerate(SIZES):
        g = generator(seed)
        mu, pi = random_policy(g, v, horizon), random_policy(g, v, horizon)
        rewards = 2 * uniform(g, PAIRS, v**horizon) - 1
        gain = theory.expected_reward(pi, rewards) - theory.expected_reward(mu, rewards)
        delta = theory.residual(mu, pi, rewards)
        worst = max(worst, float((gain - (theory.surrogate(mu, pi, rewards) - delta)).abs().max()))
        residuals.append(delta.abs())
        if horizon == 1:
            assert float(delta.abs().max()) == 0.0  # there is no suffix to forget
    residual = torch.cat(residuals)
    assert len(residual) > 1000
    assert worst < 1e-12
    assert int((residual > 1e-3).sum()) > 700


def test_residual_bounds_on_1000_pairs() -> None:
    """For pairs far apart and near each other, each under the rewards that are worst for it."""
    checked, used = 0, []
    for seed, (v, horizon) in enumerate(SIZES):
        g = generator(100 + seed)
        mu, other = random_policy(g, v, horizon), random_policy(g, v, horizon)
        near = (0.01 ** uniform(g, PAIRS))[:, None, None]
        mixed = [torch.lerp(m.exp(), p.exp(), near).log() for m, p in zip(mu.log_probs, other.log_probs, strict=True)]
        pi = TabularPolicy.from_logits(mixed)
        largest = theory.residual(mu, pi, theory.hardest_rewards(mu, pi))
        random = theory.residual(mu, pi, 2 * uniform(g, PAIRS, v**horizon) - 1).abs()
        assert bool((random <= largest + 1e-12).all())
        u, limits = theory.mean_divergence(mu, pi), theory.max_divergence(mu, pi)
        tight, union, linear = (
            theory.residual_bound(u, suffix(limits))
            for suffix in (theory.suffix_product, theory.suffix_sum, theory.suffix_linear)
        )
        assert bool((largest <= tight * (1 + 1e-12)).all())
        assert bool((tight <= union * (1 + 1e-12)).all())
        assert bool((union <= linear * (1 + 1e-12)).all())
        checked += len(largest)
        if horizon > 2:
            assert float((union - tight).max()) > 0
        if horizon > 1:
            used.append(largest / tight)
    assert checked > 1000
    assert float(torch.cat(used).min()) > 0.01, "the residuals are far from trivial"
    assert float(torch.cat(used).max()) > 0.9


@pytest.mark.parametrize("kind", ["implemented", "uniform", "eq8"])
def test_theorem_1_on_1000_pairs(kind: str) -> None:
    """Premises met by construction, rewards both random and the worst ones."""
    checked, used = 0, []
    for seed, (v, horizon) in enumerate(SIZES):
        toy = feasible_pairs(v, horizon, 200 + seed, kind)
        slack = toy.delta if kind == "eq8" else 0.0
        for rewards in (2 * uniform(generator(seed), PAIRS, v**horizon) - 1, theory.hardest_rewards(toy.mu, toy.pi)):
            bound = toy.bound(rewards, slack)
            assert bool(bound.premises_hold.all())
            gain = theory.expected_reward(toy.pi, rewards) - theory.expected_reward(toy.mu, rewards)
            assert bool((gain >= bound.value - 1e-12).all())
            assert float((bound.surrogate - bound.value - bound.penalty).abs().max()) < 1e-12
        checked += len(gain)
        # never weaker than the residual bounds that it is derived from
        loosest = theory.residual_bound(
            theory.mean_divergence(toy.mu, toy.pi), theory.suffix_linear(toy.thresholds / toy.weights)
        )
        assert bool((loosest <= bound.penalty * (1 + 1e-9)).all())
        closed = {
            "uniform": [theory.cppo_penalty(horizon, d, b) for d, b in settings_of(toy)],
            "implemented": [theory.implemented_penalty(horizon, *s) for s in settings_of(toy, toy.w_min)],
            "eq8": [
                theory.implemented_penalty(horizon, d, b, w) + theory.slack_penalty(horizon, d / w, d)
                for d, b, w in settings_of(toy, toy.w_min)
            ],
        }[kind]
        if horizon > 1:  # w_min is not reached by a single token
            assert bound.penalty.tolist() == pytest.approx(closed, rel=1e-6)  # float32 weights
            used.append(theory.residual(toy.mu, toy.pi, rewards) / bound.penalty)
    assert checked > 1000
    shares = torch.cat(used)
    assert int((shares > 0.05).sum()) > 500, "most residuals are a visible part of what the theorem allows"
    assert float(shares.max()) > 0.3


def settings_of(toy: Toy, *more: Tensor) -> list[list[float]]:
    return torch.stack([toy.delta, toy.delta_b, *more], -1).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_premises_are_seen_to_fail(seed: int) -> None:
    """Policies that go to the limit everywhere break a premise as soon as the limit is one per mille lower."""
    g = generator(seed)
    mu, toward = random_policy(g, 3, 4), random_policy(g, 3, 4)
    weights = cppo_weights(4, 0.8).expand(PAIRS, 4)
    thresholds, allowed = torch.full_like(weights, 0.05), 0.02 * weights.cumsum(-1)
    allowed[:, -1] = math.inf
    full = [torch.ones(PAIRS, 3**t, dtype=torch.float64) for t in range(4)]
    pi = within_constraints(mu, toward, weights, thresholds, allowed, full)
    rewards = torch.zeros(PAIRS, 81, dtype=torch.float64)

    def premises(c: Tensor, delta_b: float) -> list[bool]:
        bound = theory.improvement_bound(mu, pi, rewards, weights, c, delta_b)
        return [bool(x.all()) for x in (bound.thresholds_met, bound.budget_met, bound.order_met)]

    assert premises(thresholds, 0.02) == [True, True, True]
    assert premises(thresholds * 0.999, 0.02) == [False, True, True]
    assert premises(thresholds, 0.02 * 0.999) == [True, False, True]
    # a budget that is kept on average over a response but not at every prefix: all of it spent on one token
    spent_late = [torch.full((PAIRS, 3**t), float(t == 2), dtype=torch.float64) for t in range(4)]
    pi = within_constraints(mu, toward, weights, thresholds, torch.full_like(allowed, math.inf), spent_late)
    assert premises(thresholds, 0.02) == [True, True, True]
    spent_early = [torch.full((PAIRS, 3**t), float(t == 0), dtype=torch.float64) for t in range(4)]
    pi = within_constraints(mu, toward, weights, thresholds, torch.full_like(allowed, math.inf), spent_early)
    assert premises(thresholds, 0.02) == [True, False, True]


def test_a_premise_is_about_every_prefix() -> None:
    """One rare prefix beyond the limit is enough, whatever the mean."""
    mu = TabularPolicy.from_logits([torch.tensor([[0.0, -20.0]]), torch.zeros(2, 2)])
    pi = TabularPolicy.from_logits([torch.tensor([[0.0, -20.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])])
    assert float(theory.mean_divergence(mu, pi)[1]) < 1e-8
    ones = torch.ones(2, dtype=torch.float64)
    bound = theory.improvement_bound(mu, pi, torch.zeros(4, dtype=torch.float64), ones, 0.1 * ones, 0.1)
    assert [bool(bound.thresholds_met), bool(bound.budget_met)] == [False, True]


# ---------------------------------------------------------------- corollaries


def steps(divergences: list[float], p: float = 0.5) -> tuple[TabularPolicy, TabularPolicy]:
    """Two tokens; pi moves ``divergences[t]`` from the first, of probability 1 - p under mu, to the second, at every prefix."""
    rows = [torch.tensor([1 - p, p], dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)]
    mu = [rows[0].expand(2**t, 2) for t in range(len(divergences))]
    pi = [m + d * rows[1] for m, d in zip(mu, divergences, strict=True)]
    return tuple(TabularPolicy(tuple(table.log() for table in tables)) for tables in (mu, pi))  # type: ignore[return-value]


def test_uniform_bound_is_looser_by_the_stated_ratio() -> None:
    """One pair that meets the premises of all three, with none to spare: delta at the last token, delta_b at the others."""
    delta, delta_b, w_min, horizon = 0.15, 0.02, 0.8, 5
    mu, pi = steps([delta_b] * (horizon - 1) + [delta])
    rewards = theory.hardest_rewards(mu, pi)
    assert theory.max_divergence(mu, pi).tolist() == pytest.approx([delta_b] * 4 + [delta], rel=1e-12)
    weights, ones = cppo_weights(horizon, w_min), torch.ones(horizon, dtype=torch.float64)
    uniform = theory.improvement_bound(mu, pi, rewards, ones, ones * delta, delta)
    cppo = theory.improvement_bound(mu, pi, rewards, weights, weights * delta, delta_b)
    implemented = theory.improvement_bound(mu, pi, rewards, weights, ones * delta, delta_b)
    assert all(bool(bound.premises_hold) for bound in (uniform, cppo, implemented))
    # the pair needs all of delta and of delta_b
    assert not bool(theory.improvement_bound(mu, pi, rewards, ones, ones * delta * 0.999, delta).premises_hold)
    assert not bool(theory.improvement_bound(mu, pi, rewards, weights, ones * delta, delta_b * 0.999).premises_hold)

    assert float(uniform.penalty) == pytest.approx(theory.uniform_penalty(horizon, delta), rel=1e-12)
    assert float(cppo.penalty) == pytest.approx(theory.cppo_penalty(horizon, delta, delta_b), rel=1e-12)
    assert float(implemented.penalty) == pytest.approx(theory.implemented_penalty(horizon, delta, delta_b, w_min), rel=1e-6)
    assert float(cppo.penalty / uniform.penalty) == pytest.approx(delta_b / delta, rel=1e-12)
    assert float(implemented.penalty / uniform.penalty) == pytest.approx(delta_b / (delta * w_min), rel=1e-6)
    gain = theory.expected_reward(pi, rewards) - theory.expected_reward(mu, rewards)
    assert float(uniform.value) < float(implemented.value) < float(cppo.value) < float(gain)


@pytest.mark.parametrize(("delta_b", "tighter"), [(0.119, True), (0.121, False)])
def test_implemented_is_tighter_exactly_below_delta_w_min(delta_b: float, tighter: bool) -> None:
    assert (theory.implemented_penalty(8192, 0.15, delta_b, 0.8, 0.5) < theory.uniform_penalty(8192, 0.15, 0.5)) is tighter


def test_initial_slack_is_needed_and_enough() -> None:
    """CPPO's mask keeps both tokens of this pair, whose residual exceeds the penalty of Eq. 6 and not that of Eq. 17."""
    delta, delta_b, d = 0.15, 0.02, 0.084
    cppo = CPPO(BinaryTV(), delta=delta, delta_b=delta_b, w_min=1, adaptive=False)
    assert cppo(from_probabilities([0.5, 0.5], [0.5 + d, 0.5 + d], 1.0)).keep.all()
    mu, pi = steps([d, d])
    ones = torch.ones(2, dtype=torch.float64)
    rewards = theory.hardest_rewards(mu, pi)
    loss = float(theory.residual(mu, pi, rewards))
    plain = theory.improvement_bound(mu, pi, rewards, ones, ones * delta, delta_b)
    slack = theory.improvement_bound(mu, pi, rewards, ones, ones * delta, delta_b, slack=delta)
    assert [bool(plain.premises_hold), bool(slack.premises_hold)] == [False, True]
    assert float(plain.penalty) < 0.5 * loss < loss < float(slack.penalty)
    assert float(slack.penalty - plain.penalty) == pytest.approx(theory.slack_penalty(2, delta, delta), rel=1e-12)


@pytest.mark.parametrize("horizon", range(2, 6))
def test_terminal_only_budget(horizon: int) -> None:
    """A pair that spends the whole budget on its first token: fine for a terminal budget, and as costly as stated."""
    delta, delta_b = 0.4, 0.04
    mu, pi = steps([delta_b * (horizon - 1)] + [0.0] * (horizon - 1))
    ones = torch.ones(horizon, dtype=torch.float64)
    suffix = theory.suffix_linear(ones * delta)
    spent = theory.mean_divergence(mu, pi)
    assert float(spent[:-1].sum()) == pytest.approx(delta_b * (horizon - 1))
    terminal = float(theory.terminal_penalty(suffix, ones, delta_b * (horizon - 1)))
    assert float(theory.residual_bound(spent, suffix)) == pytest.approx(terminal, rel=1e-12)
    assert terminal == pytest.approx(4 * delta * (horizon - 1) ** 2 * delta_b, rel=1e-12)
    every = float(theory.prefix_penalty(suffix, ones, delta_b))
    assert every == pytest.approx(theory.theorem_penalty(horizon, delta, delta_b), rel=1e-12)
    assert terminal / every == pytest.approx(2 - 2 / horizon, rel=1e-12)
    # TRM-Avg's mean is over all T tokens
    assert float(theory.terminal_penalty(suffix, ones, delta_b * horizon)) / every == pytest.approx(2, rel=1e-12)
    bound = theory.improvement_bound(mu, pi, theory.hardest_rewards(mu, pi), ones, ones * delta, delta_b)
    assert bool(bound.budget_met) is (horizon == 2)


@pytest.mark.parametrize("w_min", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("horizon", [2, 3, 5, 64, 1024])
def test_the_linear_schedule_has_the_order_that_the_theorem_needs(horizon: int, w_min: float) -> None:
    """(T - t) / w_t falls by w_min / (w_t w_{t+1}) per token (Prop. 5)."""
    w = cppo_weights(horizon, w_min)
    profile = theory.suffix_linear(torch.ones(horizon, dtype=torch.float64)) / w
    torch.testing.assert_close(-profile.diff(), w_min / (w[1:] * w[:-1]), rtol=2e-2 if horizon > 64 else 1e-4, atol=0)


def test_order_premise_depends_on_the_suffix_bound() -> None:
    """App. B.9: the product saturates at early positions, so its profile may rise where the linear one falls."""
    mu, pi = steps([0.01] * 5)
    rewards, weights = torch.zeros(32, dtype=torch.float64), cppo_weights(5, 0.3)
    for level, ordered in ((0.02, True), (0.9, False)):
        for suffix, expected in ((theory.suffix_linear, True), (theory.suffix_product, ordered)):
            bound = theory.improvement_bound(mu, pi, rewards, weights, weights * level, 0.01, suffix=suffix)
            assert bool(bound.order_met) is expected


def test_product_form_of_the_theorem() -> None:
    """With l = delta its penalty is 4 xi delta_b sum_t (1 - (1 - delta)^(T - t)): below Theorem 1's, and linear in T."""
    used = []
    for seed, (v, horizon) in enumerate(SIZES):
        toy = feasible_pairs(v, horizon, 300 + seed, "uniform")
        rewards = theory.hardest_rewards(toy.mu, toy.pi)
        linear, tight = toy.bound(rewards), toy.bound(rewards, suffix=theory.suffix_product)
        held = tight.premises_hold
        assert float(held.double().mean()) > 0.5
        gain = theory.expected_reward(toy.pi, rewards) - theory.expected_reward(toy.mu, rewards)
        assert bool((gain >= tight.value - 1e-12)[held].all())
        assert bool((tight.penalty <= linear.penalty * (1 + 1e-12)).all())
        formula = 4 * toy.delta_b * sum(1 - (1 - toy.delta) ** (horizon - t) for t in range(1, horizon + 1))
        torch.testing.assert_close(tight.penalty, formula, rtol=1e-9, atol=0)
        if horizon > 2:
            used.append((tight.penalty / linear.penalty)[held])
    assert float(torch.cat(used).min()) < 0.8
    limits = torch.full((4096,), 0.15, dtype=torch.float64)
    product_form = theory.prefix_penalty(theory.suffix_product(limits), torch.ones_like(limits), 0.02)
    assert float(product_form) < 4 * 0.02 * 4096 < theory.cppo_penalty(4096, 0.15, 0.02) / 100


def test_a_limit_above_one_is_no_limit() -> None:
    """c_t / w_t may exceed 1, which total variation cannot."""
    limits = torch.tensor([0.3, 0.5, 1.5, 0.2, 0.1], dtype=torch.float64)
    assert theory.suffix_product(limits).tolist() == pytest.approx([1.0, 1.0, 1 - 0.8 * 0.9, 0.1, 0.0], abs=1e-15)


# ---------------------------------------------------------------- tightness


@pytest.mark.parametrize(("delta", "delta_b"), [(0.15, 0.15), (0.15, 0.02), (0.4, 0.01)])
def test_two_tokens_attain_the_residual_bound_and_theorem_1(delta: float, delta_b: float) -> None:
    mu, pi = steps([delta_b, delta])
    rewards = 0.7 * theory.hardest_rewards(mu, pi)
    loss = float(theory.residual(mu, pi, rewards))
    suffix = theory.suffix_product(theory.max_divergence(mu, pi))
    assert loss == pytest.approx(float(theory.residual_bound(theory.mean_divergence(mu, pi), suffix, xi=0.7)), rel=1e-12)
    ones = torch.ones(2, dtype=torch.float64)
    bound = theory.improvement_bound(mu, pi, rewards, ones, ones * delta, delta_b, xi=0.7)
    assert bool(bound.premises_hold)
    gain = theory.expected_reward(pi, rewards) - theory.expected_reward(mu, rewards)
    assert float(gain) == pytest.approx(float(bound.value), abs=1e-14)


@pytest.mark.parametrize("horizon", range(2, 6))
def test_rare_tokens_approach_the_bound_at_any_horizon(horizon: int) -> None:
    """pi makes a token of probability 1e-3 likelier by 1e-3 of it, and the residual is 2 xi T (T - 1) delta^2 to a per cent."""
    delta = 1e-6
    mu, pi = steps([delta] * horizon, p=1e-3)
    loss = float(theory.residual(mu, pi, theory.hardest_rewards(mu, pi)))
    attained = loss / theory.uniform_penalty(horizon, delta)
    assert 0.99 < attained <= 1 + 1e-9
    # even tokens cancel in part: with n of T tokens up, the integrand is 2 delta^2 ((2n - T)^2 - T)
    mu, pi = steps([delta] * horizon)
    even = float(theory.residual(mu, pi, theory.hardest_rewards(mu, pi))) / theory.uniform_penalty(horizon, delta)
    share = sum(math.comb(horizon, n) * abs((2 * n - horizon) ** 2 - horizon) for n in range(horizon + 1)) / 2**horizon
    assert even == pytest.approx(share / (horizon * (horizon - 1)), rel=1e-4)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), horizon=st.integers(2, 8), delta_b=st.floats(0.001, 0.1), slack=st.sampled_from([0.0, 0.15]))
def test_prefix_penalty_is_the_maximum_under_prefix_budgets(
    data: st.DataObject, horizon: int, delta_b: float, slack: float
) -> None:
    """No u within the budgets exceeds it, and one equals it: delta_b at every token, the slack spent on the first."""
    positive = st.lists(st.floats(0.05, 1.0), min_size=horizon, max_size=horizon)
    weights = torch.tensor(data.draw(positive), dtype=torch.float64)
    profile = torch.tensor(sorted(data.draw(positive), reverse=True), dtype=torch.float64)
    profile[-1] = 0
    suffix = profile * weights
    penalty = float(theory.prefix_penalty(suffix, weights, delta_b, slack))
    allowed, spent, u = slack + delta_b * weights.cumsum(-1), 0.0, []
    for share, w, most in zip(data.draw(positive), weights.tolist(), allowed.tolist(), strict=True):
        u.append(share * max(most - spent, 0.0) / w)
        spent += w * u[-1]
    assert float(theory.residual_bound(torch.tensor(u, dtype=torch.float64), suffix)) <= penalty * (1 + 1e-12)
    best = torch.full_like(weights, delta_b)
    best[0] += slack / weights[0]
    assert float(theory.residual_bound(best, suffix)) == pytest.approx(penalty, rel=1e-12)
    most = float(theory.terminal_penalty(suffix, weights, float(allowed[-2])))
    assert penalty <= most * (1 + 1e-12)


# ---------------------------------------------------------------- inputs


def test_a_policy_that_drops_a_token() -> None:
    """pi may give up a token (rho = 0), mu may not."""
    log = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64).log()
    mu = TabularPolicy((log[:, :1], log[:, :1].expand(1, 2, 2)))
    pi = TabularPolicy((log[:, 1:], log[:, :1].expand(1, 2, 2)))
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert theory.total_variation(mu, pi)[0].tolist() == [[0.5]]
    assert theory.surrogate(mu, pi, rewards).tolist() == [0.5]
    assert theory.residual(mu, pi, rewards).tolist() == [0.0]
    with pytest.raises(ValueError, match="mu must give every token a probability above 0"):
        theory.surrogate(pi, mu, rewards)


def test_errors() -> None:
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    mu, longer = TabularPolicy((half,)), TabularPolicy((half, half.expand(2, 2)))
    rewards, one = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="log_probs is empty"):
        TabularPolicy(())
    with pytest.raises(ValueError, match=r"log_probs\[1\] must be \[\.\.\., 2, 2\] torch.float64, got \[1, 2\]"):
        TabularPolicy((half, half))
    with pytest.raises(ValueError, match=r"log_probs\[0\] must be .* got \[1, 2\] torch.float32"):
        TabularPolicy((half.float(),))
    for bad in (half + 0.1, half * math.nan):
        with pytest.raises(ValueError, match="probabilities sum to 1"):
            TabularPolicy((bad,))
    with pytest.raises(ValueError, match="mu has V = 2, T = 1 and pi has V = 2, T = 2"):
        theory.residual(mu, longer, rewards)
    with pytest.raises(ValueError, match=r"V\^T = 4, got \[2\]"):
        theory.expected_reward(longer, rewards)
    for change, message in (
        ({"rewards": rewards * 2}, r"rewards must be within \+-xi = 1.0, got 2.0"),
        ({"rewards": rewards * math.nan}, "rewards must be within"),
        ({"weights": one * 0}, "weights must be above 0, got 0.0"),
        ({"weights": torch.ones(2)}, r"weights must be \[\.\.\., T\] with T = 1, got \[2\]"),
        ({"thresholds": -one}, "thresholds must be at least 0, got -1.0"),
        ({"delta_b": -0.5}, "delta_b must be at least 0, got -0.5"),
        ({"slack": -0.5}, "slack must be at least 0, got -0.5"),
    ):
        given_ = {"rewards": rewards, "weights": one, "thresholds": one, "delta_b": 0.1, **change}
        with pytest.raises(ValueError, match=message):
            theory.improvement_bound(mu, mu, **given_)  # type: ignore[arg-type]


def test_the_page_shows_what_its_example_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/theory.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_page_names_every_function() -> None:
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    assert [name for name in theory.__all__ if not re.search(rf"\b{name}\b", page)] == []
