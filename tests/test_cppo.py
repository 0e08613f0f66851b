"""CPPO and its variants against the worked vectors, a per-token loop of Algorithm 1, and what must hold of any batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.divergences import BinaryKL, BinaryTV, Divergence, TopKKL, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import CPPO, DPPO
from cppo_lightning.trust_regions.cppo import masked_quantile
from cppo_lightning.trust_regions.fixed_horizon_cppo import FixedHorizonCPPO
from cppo_lightning.trust_regions.shuffled_cppo import ShuffledCPPO
from cppo_lightning.trust_regions.soft_cppo import SoftCPPO
from tests.oracles_cppo import Batch, algorithm_1, divergences, random_batch, spoil, thousand_batches, top_k_of
from tests.worked import VECTORS, from_probabilities, response, stack

C = from_probabilities([0.50, 0.40, 0.30, 0.20], [0.62, 0.46, 0.31, 0.21], 1.0)
CASES = {
    "cppo_A_topk_fixed": (response("A"), CPPO(TopKTV(2), adaptive=False)),
    "cppo_A_topk_adaptive": (response("A"), CPPO(TopKTV(2))),
    "cppo_A_binary_fixed": (response("A"), CPPO(BinaryTV(), adaptive=False)),
    "cppo_A_topk_no_budget": (response("A"), CPPO(TopKTV(2), delta_b=1e9, adaptive=False)),
    "cppo_B_topk_fixed": (response("B"), CPPO(TopKTV(2), adaptive=False)),
    "cppo_C_fixed": (C, CPPO(BinaryTV(), adaptive=False)),
    "cppo_C_adaptive": (C, CPPO(BinaryTV())),
    "cppo_T1": (from_probabilities([0.32], [0.48], 1.0), CPPO(BinaryTV(), adaptive=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_worked_vectors(name: str) -> None:
    stats, cppo = CASES[name]
    expected, gate = VECTORS[name], cppo(stats)
    dropped_by = {"token": "masked_by_position", "prefix": "masked_by_budget"}

    def close(actual: torch.Tensor, key: str) -> None:
        # float32 against ten decimals of float64
        np.testing.assert_allclose(actual.squeeze(0).numpy(), expected[key], rtol=2e-6, atol=2e-7, err_msg=key)

    close(cppo.position_weight(stats.mask), "w")
    close(gate.diagnostics["divergence"], "D")
    close(gate.diagnostics["weighted_divergence"], "Z")
    close(masked_quantile(gate.diagnostics["divergence"], stats.mask, 0.9), "p90")
    close(gate.diagnostics["delta_b"], "delta_b_used")
    close(gate.diagnostics["threshold"], "c")
    close(gate.diagnostics["toward"].float(), "toward")
    close(gate.keep.float(), "keep")
    close(-stats.advantages * gate.weight, "g")
    for cause, key in dropped_by.items():
        assert gate.diagnostics[key].squeeze(0).tolist() == [c == cause for c in expected["cause"]]
    spent = np.cumsum(expected["Z"])[-1] / (cppo.delta + expected["delta_b_used"] * expected["W_prev"][-1])
    np.testing.assert_allclose(gate.diagnostics["budget_spent"].numpy(), [spent], rtol=2e-6)
    exhausted = [i for i, c in enumerate(expected["c"]) if c <= 0]
    assert gate.diagnostics["budget_exhausted"].tolist() == [bool(exhausted)]
    assert gate.diagnostics["first_exhausted"].tolist() == [exhausted[0] if exhausted else -1]


@dataclass(frozen=True)
class Given(Divergence):
    """D_t as given, exactly, which probabilities can hardly make it."""

    values: tuple[float, ...]

    def __call__(self, stats: TokenStats) -> torch.Tensor:
        return torch.tensor([self.values])


def test_a_token_at_its_limit_is_kept_and_a_budget_spent_to_the_last_is_exhausted() -> None:
    """Z_t = c_t at tokens 1 (its own limit), 2 and 5 (the budget's); 3 is the next float32 above it, 4 beyond delta."""
    above = 0.25 + 2.0**-25
    cppo = CPPO(Given((0.5, 0.25, above, 1.0, 0.0)), delta=0.5, delta_b=0.25, w_min=1.0, adaptive=False)
    gate = cppo(from_probabilities([0.5] * 5, [0.6] * 5, 1.0))
    np.testing.assert_allclose(gate.diagnostics["threshold"][0].numpy(), [0.5, 0.25, 0.25, 0.25, -0.5], atol=1e-7)
    assert gate.keep[0].tolist() == [True, True, False, False, False]
    assert gate.diagnostics["masked_by_budget"][0].tolist() == [False, False, True, False, True]
    last = replace(cppo, divergence=Given((0.5, 0.25, 0.5, 0.25, 0.0)))(from_probabilities([0.5] * 5, [0.6] * 5, 1.0))
    assert last.diagnostics["threshold"][0].tolist() == [0.5, 0.25, 0.25, 0.0, 0.0]
    assert last.keep[0].tolist() == [True, True, False, False, True]
    assert last.diagnostics["first_exhausted"].tolist() == [3]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"cppo_A_topk_no_budget"}))
def test_worked_vectors_of_the_soft_gate(name: str) -> None:
    stats, cppo = CASES[name]
    soft = SoftCPPO(cppo.divergence, adaptive=cppo.adaptive)(stats)
    expected = np.array(VECTORS[name]["soft_mask"]) * VECTORS[name]["rho"]
    np.testing.assert_allclose(soft.weight[0].numpy(), expected, rtol=3e-6)
    assert torch.equal(soft.keep, cppo(stats).keep)
    assert (np.array(VECTORS[name]["soft_mask"])[~soft.keep[0].numpy()] < 1).all()


def test_worked_vector_without_a_budget() -> None:
    """The vector has a budget of 1e9 per token; none at all decides the same."""
    expected, gate = VECTORS["cppo_A_topk_no_budget"], CPPO(TopKTV(2), delta_b=None)(response("A"))
    np.testing.assert_allclose(gate.diagnostics["threshold"][0].numpy(), expected["c"], rtol=2e-6)
    np.testing.assert_allclose(-gate.weight[0].numpy(), expected["g"], rtol=2e-6)
    assert not any("budget_" in name and "masked" not in name for name in gate.diagnostics)
    assert not gate.diagnostics["masked_by_budget"].any()


def test_worked_vector_of_a_fixed_horizon() -> None:
    expected, cppo = VECTORS["cppo_C_padded64"], FixedHorizonCPPO(BinaryTV(), adaptive=False, horizon=64)
    gate = cppo(C)
    np.testing.assert_allclose(cppo.position_weight(C.mask)[0].numpy(), expected["w"], rtol=2e-6)
    np.testing.assert_allclose(gate.diagnostics["threshold"][0].numpy(), expected["c"], rtol=2e-5, atol=2e-7)
    assert gate.keep[0].tolist() == [bool(k) for k in expected["keep"]]


@pytest.mark.parametrize("kind", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_worked_aggregates(kind: str) -> None:
    stats = stack(response("A"), response("B"))
    gate = CPPO(TopKTV(2), adaptive=False)(stats)
    aggregation = LossAggregation(kind, 4 if kind.endswith("norm") else None)  # type: ignore[arg-type]
    coefficients = aggregation.coefficients(stats.mask, Totals(stats.mask.sum(), torch.tensor(2)))
    key = kind.replace("-", "_")
    ratio_form = -surrogate_value(stats.advantages, gate, coefficients)
    logp_form = policy_gradient_loss(stats.logp.masked_fill(~stats.mask, 0), stats.advantages, gate, coefficients)
    assert float(ratio_form) == pytest.approx(VECTORS["cppo_AB_agg_ratio_form"][key], rel=2e-6)
    assert float(logp_form) == pytest.approx(VECTORS["cppo_AB_agg_logp_form"][key], rel=2e-6)


def test_padding_width_does_not_enter() -> None:
    """The spec's ``cppo_C_padded64`` is what a mask with the padded width as T would give; ours must differ from it."""
    alone, padded = CPPO(BinaryTV())(C), CPPO(BinaryTV())(stack(C, width=64))
    for name, value in alone.diagnostics.items():
        wide = padded.diagnostics[name]
        torch.testing.assert_close(wide[:, :4] if wide.dim() == 2 else wide, value, rtol=0, atol=0)
    w = CPPO(BinaryTV()).position_weight(stack(C, width=64).mask)[0, :4]
    assert not np.allclose(w.numpy(), VECTORS["cppo_C_padded64"]["w"])


def random_stats(seed: int, rows: int = 12, width: int = 40, vocabulary: int = 30, k: int = 5) -> TokenStats:
    """Responses of random length, some of one token, with untrained tokens inside and garbage in the padding."""
    g = torch.Generator().manual_seed(seed)
    mu = torch.randn(rows, width, vocabulary, generator=g).mul(2).log_softmax(-1)
    drift = torch.rand(rows, 1, 1, generator=g) * 0.9
    pi = (mu + torch.randn(rows, width, vocabulary, generator=g) * drift).log_softmax(-1)
    ids = mu.exp().flatten(0, 1).multinomial(1, generator=g).view(rows, width)
    top = mu.topk(k).indices
    lengths = torch.randint(1, width + 1, (rows, 1), generator=g)
    lengths[0] = 1
    mask = (torch.arange(width) < lengths) & (torch.rand(rows, width, generator=g) > 0.1)
    mask[:, 0] = True
    garbage = torch.where(mask, 0.0, torch.tensor(7e4))
    return TokenStats(
        response_ids=ids,
        logp=pi.gather(-1, ids[..., None]).squeeze(-1) + garbage,
        rollout_logp=mu.gather(-1, ids[..., None]).squeeze(-1) - garbage,
        advantages=torch.randn(rows, 1, generator=g).expand(rows, width),
        mask=mask,
        topk_ids=top,
        topk_rollout_logp=mu.gather(-1, top),
        topk_logp=pi.gather(-1, top),
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "cppo",
    [
        CPPO(TopKTV(5)),
        CPPO(BinaryTV(), adaptive=False),
        CPPO(TopKTV(5), w_min=0.3, quantile=0.5, ceiling=5),
        CPPO(TopKTV(3), w_min=1),
    ],
    ids=["paper", "binary-fixed", "median", "flat"],
)
def test_equals_a_loop_over_tokens(seed: int, cppo: CPPO) -> None:
    stats = random_stats(seed)
    gate = cppo(stats)
    assert not gate.keep[~stats.mask].any()
    assert torch.equal(gate.weight[~stats.mask], torch.zeros_like(gate.weight[~stats.mask]))
    divergence = cppo.divergence(stats)
    for row, own in enumerate(stats.mask):
        d, rho = divergence[row, own].double().tolist(), stats.ratio[row, own].double().tolist()
        expected = algorithm_1(cppo, d, rho, float(stats.advantages[row, 0]), stats.response_ids[row, own].tolist())
        np.testing.assert_allclose(
            gate.diagnostics["threshold"][row, own].numpy(), [token.threshold for token in expected], atol=3e-6
        )
        # a decision may differ only where float32 cannot tell Z_t from c_t
        certain = [token.margin > 3e-6 for token in expected]
        np.testing.assert_array_equal(gate.keep[row, own].numpy()[certain], np.array([t.keep for t in expected])[certain])
    dropped = stats.mask & ~gate.keep
    assert dropped.any(), "a batch in which nothing is dropped tests nothing"
    assert torch.equal(dropped, gate.diagnostics["masked_by_position"] | gate.diagnostics["masked_by_budget"])


VARIANTS = {
    "paper": CPPO(),
    "binary TV, fixed": CPPO(BinaryTV(), adaptive=False),
    "Top-K KL": CPPO(TopKKL(), delta=0.1, delta_b=0.002),
    "binary KL": CPPO(BinaryKL(), delta=0.1, delta_b=0.002),
    "no position weight": CPPO(w_min=1.0),
    "no budget": CPPO(delta_b=None),
    "ratio cap": CPPO(max_ratio=1.2, quantile=0.5, ceiling=5.0),
    "fixed horizon": FixedHorizonCPPO(ceiling=5.0, horizon=9, w_min=0.3),
    "shuffled": ShuffledCPPO(w_min=0.3, seed=7),
    "soft": SoftCPPO(),
    "soft, no budget": SoftCPPO(delta_b=None, delta=0.05, max_ratio=1.5),
}


def on(cppo: CPPO, stats: TokenStats) -> CPPO:
    """The trust region with as many top-K entries as the batch has."""
    assert stats.topk_ids is not None
    return replace(cppo, divergence=top_k_of(cppo.divergence, stats.topk_ids.shape[-1]))


@pytest.mark.parametrize("name", VARIANTS)
def test_thousand_batches_equal_a_loop_over_tokens(name: str) -> None:
    """Divergence, position weight, budget, decision and weight, each from the full distributions in float64."""
    counts = {True: 0, False: 0}
    for batch in thousand_batches():
        cppo = on(VARIANTS[name], batch.stats)
        gate = cppo(batch.stats)
        assert torch.equal(gate.weight[~batch.stats.mask], torch.zeros(int((~batch.stats.mask).sum())))
        assert not gate.keep[~batch.stats.mask].any()
        for own, weight, keep, row in zip(batch.stats.mask, gate.weight, gate.keep, batch.responses, strict=True):
            d = divergences(cppo.divergence, row)
            expected = algorithm_1(cppo, d, row.ratios, row.advantage, row.ids)
            for token, w, k in zip(expected, weight[own].tolist(), keep[own].tolist(), strict=True):
                counts[k] += 1
                if token.margin > 3e-6:  # float32 cannot tell Z_t from c_t, or rho from 1, any closer
                    assert k is token.keep
                    assert w == pytest.approx(token.weight, rel=2e-5, abs=1e-6)
    assert min(counts.values()) > 300, "a strategy that hardly ever drops or keeps tests little"


# sizes shrink to a small batch, and the seed stands for its numbers
BATCHES = st.builds(random_batch, st.integers(0, 2**31), st.integers(2, 9))
PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)


def equal(a: Gate, b: Gate) -> bool:
    return torch.equal(a.weight, b.weight) and torch.equal(a.keep, b.keep)


@PROPERTY
@given(BATCHES, st.floats(0.01, 0.4), st.sampled_from([None, 1.2]))
def test_with_neither_weight_nor_budget_it_is_dppo_bit_for_bit(batch: Batch, delta: float, cap: float | None) -> None:
    for divergence in (TopKTV(), TopKKL(), BinaryTV(), BinaryKL()):
        cppo = on(CPPO(divergence, delta, delta_b=None, w_min=1.0, max_ratio=cap), batch.stats)
        assert equal(cppo(batch.stats), DPPO(cppo.divergence, delta, cap)(batch.stats))


@pytest.mark.parametrize("name", VARIANTS)
@PROPERTY
@given(batch=BATCHES)
def test_on_policy_every_token_is_kept_with_weight_one(name: str, batch: Batch) -> None:
    stats = replace(batch.stats, logp=batch.stats.rollout_logp, topk_logp=batch.stats.topk_rollout_logp)
    gate = on(VARIANTS[name], stats)(stats)
    assert torch.equal(gate.keep, stats.mask)
    assert torch.equal(gate.weight, stats.mask.float())


@pytest.mark.parametrize("name", VARIANTS)
@PROPERTY
@given(batch=BATCHES)
def test_a_token_that_moves_toward_mu_is_kept_whatever_its_divergence(name: str, batch: Batch) -> None:
    stats = batch.stats
    gate = on(replace(VARIANTS[name], delta=1e-6), stats)(stats)
    toward = stats.mask & (stats.advantages.sign() * (stats.ratio - 1).sign() <= 0)
    assert bool(gate.keep[toward].all())
    cap = VARIANTS[name].max_ratio or float("inf")
    assert torch.equal(gate.weight[toward], stats.ratio[toward].clamp(max=cap))


@pytest.mark.parametrize("name", VARIANTS)
@PROPERTY
@given(batch=BATCHES, other=BATCHES, wider=st.integers(0, 30), left=st.integers(0, 5))
def test_padding_order_and_company_change_nothing(name: str, batch: Batch, other: Batch, wider: int, left: int) -> None:
    """Bit for bit, with padding on both sides, rows reversed, and among responses of another batch."""
    stats, cppo = batch.stats, on(VARIANTS[name], batch.stats)
    alone, rows = cppo(stats), len(stats.mask)

    def widen(values: torch.Tensor | None, company: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or company is None:
            return None
        width = left + max(values.shape[1], company.shape[1]) + wider
        out = values.new_zeros(rows + len(company), width, *values.shape[2:])
        out[:rows, left : left + values.shape[1]] = values.flip(0)
        columns = [company[..., :1].expand(*company.shape[:2], values.shape[2])] if values.dim() == 3 else [company]
        out[rows:, : company.shape[1]] = columns[0]
        return out

    moved = spoil(TokenStats(**{k: widen(v, getattr(other.stats, k)) for k, v in vars(stats).items()}))  # type: ignore[arg-type]
    gate = cppo(moved)
    own = slice(left, left + stats.mask.shape[1])
    assert torch.equal(gate.weight[:rows, own].flip(0), alone.weight)
    assert torch.equal(gate.keep[:rows, own].flip(0), alone.keep)
    for diagnostic, value in alone.diagnostics.items():
        assert bool(gate.diagnostics[diagnostic].isfinite().all()), diagnostic
        there = gate.diagnostics[diagnostic][:rows].flip(0)
        assert torch.equal(there[:, own] if value.dim() == 2 else there, value), diagnostic
    assert bool(gate.weight.isfinite().all())


@PROPERTY
@given(BATCHES)
def test_kept_is_what_both_bounds_allow(batch: Batch) -> None:
    """Z_t <= c_t is Z_t <= delta and S_t <= delta + delta_b W_{t-1}."""
    stats, cppo = batch.stats, on(CPPO(), batch.stats)
    gate = cppo(stats)
    w = cppo.position_weight(stats.mask).double()
    z = w * gate.diagnostics["divergence"].double()
    s, allowed = z.cumsum(-1), cppo.delta + gate.diagnostics["delta_b"].double()[:, None] * (w.cumsum(-1) - w)
    margin = torch.minimum((z - cppo.delta).abs(), (s - allowed).abs())
    feasible = (z <= cppo.delta) & (s <= allowed)
    certain = stats.mask & ~gate.diagnostics["toward"] & (margin > 3e-6)
    assert torch.equal(gate.keep[certain], feasible[certain])


@pytest.mark.parametrize("cppo", [CPPO(), FixedHorizonCPPO()], ids=["own length", "fixed horizon"])
def test_position_weights_are_float32_whatever_tensors_are_by_default(cppo: CPPO) -> None:
    mask = torch.ones(1, 8192, dtype=torch.bool)
    expected = 1 - 0.2 * torch.arange(8192, dtype=torch.float64) / 8191
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = cppo.position_weight(mask)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-7)


@PROPERTY
@given(BATCHES, st.integers(-(2**62), 2**62))
def test_shuffled_weights_are_the_same_ones(batch: Batch, seed: int) -> None:
    stats = batch.stats
    plain, shuffled = CPPO().position_weight(stats.mask), ShuffledCPPO(seed=seed).token_weight(stats)
    assert torch.equal(plain.sort(-1).values, shuffled.sort(-1).values)
    assert torch.equal(shuffled[~stats.mask], torch.zeros_like(shuffled[~stats.mask]))


def test_the_shuffle_depends_on_the_seed_and_on_the_response_alone() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(50_000, (4000, 20), generator=g)
    ids[1] = ids[0]
    ids[2] = ids[0].flip(0)
    zeros = torch.zeros(ids.shape)
    stats = TokenStats(ids, zeros, zeros, zeros, torch.ones_like(ids, dtype=torch.bool))
    place = ShuffledCPPO(seed=0).shuffled_positions(stats)
    assert torch.equal(place.sort(-1).values, torch.arange(20).expand(4000, 20))
    assert torch.equal(place[0], place[1])
    assert not torch.equal(place[0], place[2])
    assert not torch.equal(place, ShuffledCPPO(seed=1).shuffled_positions(stats))
    assert torch.equal(place, ShuffledCPPO(seed=0).shuffled_positions(replace(stats, logp=zeros - 1)))
    # each of the 400 pairs of position and place comes up 200 times on average, with a standard deviation of 14
    counts = torch.zeros(20, 20).index_put_((torch.arange(20).expand(4000, 20), place), torch.ones(1), accumulate=True)
    assert float((counts - 200).abs().max()) < 5 * 14
    later = (place[:, 1:] > place[:, :-1]).float().mean()
    assert float(later) == pytest.approx(0.5, abs=0.01)


def test_a_fixed_horizon_is_the_papers_weight_for_a_response_of_that_length() -> None:
    mask = torch.ones(1, 40, dtype=torch.bool)
    torch.testing.assert_close(FixedHorizonCPPO(horizon=40).position_weight(mask), CPPO().position_weight(mask))
    beyond = FixedHorizonCPPO(horizon=10).position_weight(mask)[0]
    torch.testing.assert_close(beyond[9:], torch.full((31,), 0.8))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_textbook_surrogate(name: str, seed: int) -> None:
    """Eq. 11: sum of keep_t rho_t A_t with a differentiable rho_t; a capped ratio is ``sg(min(rho, C)) log pi`` instead."""
    stats = random_stats(seed)
    cppo = on(VARIANTS[name], stats)
    mask = stats.mask
    logp = stats.logp.masked_fill(~mask, 0).requires_grad_()
    ratio = (logp - stats.rollout_logp.masked_fill(~mask, 0)).exp()
    gate = torch.zeros(mask.shape)
    divergence = cppo.divergence(stats)
    for row, own in enumerate(mask):
        d, rho = divergence[row, own].double().tolist(), ratio[row, own].double().tolist()
        uncapped = replace(cppo, max_ratio=None)
        tokens = algorithm_1(uncapped, d, rho, float(stats.advantages[row, 0]), stats.response_ids[row, own].tolist())
        assert min(token.margin for token in tokens) > 1e-7, "another seed: float32 might decide otherwise here"
        gate[row, own] = torch.tensor([token.weight / r for token, r in zip(tokens, rho, strict=True)])
    if cppo.max_ratio is None:
        objective = gate * ratio * stats.advantages
    else:
        objective = gate * ratio.detach().clamp(max=cppo.max_ratio) * stats.advantages * logp
    (expected,) = torch.autograd.grad(-(objective * mask).sum() / mask.sum(), logp)

    coefficients = LossAggregation().coefficients(mask, Totals(mask.sum(), torch.tensor(len(mask))))
    loss = policy_gradient_loss(logp, stats.advantages, cppo(stats), coefficients)
    (ours,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-8)
    assert bool((ours[mask] == 0).any()) is not isinstance(cppo, SoftCPPO)


def test_paddings_and_row_order_change_nothing() -> None:
    stats = random_stats(3)
    wide = stack(
        *[TokenStats(**{k: v[i : i + 1] for k, v in vars(stats).items() if v is not None}) for i in (5, 0, 7)], width=91
    )
    narrow, other = CPPO(TopKTV(5))(stats), CPPO(TopKTV(5))(wide)
    for i, row in enumerate((5, 0, 7)):
        torch.testing.assert_close(other.weight[i, :40], narrow.weight[row], rtol=0, atol=0)
        assert torch.equal(other.keep[i, :40], narrow.keep[row])


def test_on_policy_keeps_everything_with_weight_one() -> None:
    stats = random_stats(1)
    same = TokenStats(**{**vars(stats), "logp": stats.rollout_logp, "topk_logp": stats.topk_rollout_logp})
    gate = CPPO(TopKTV(5))(same)
    assert torch.equal(gate.keep, stats.mask)
    assert torch.equal(gate.weight, stats.mask.float())


def test_max_ratio_caps_the_weight_and_not_the_decision() -> None:
    free, capped = CPPO(TopKTV(5))(random_stats(2)), CPPO(TopKTV(5), max_ratio=1.1)(random_stats(2))
    assert torch.equal(free.keep, capped.keep)
    assert torch.equal(capped.weight, free.weight.clamp(max=1.1))
    assert float(free.weight.max()) > 1.1


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_masked_quantile_equals_numpy(q: float) -> None:
    g = torch.Generator().manual_seed(0)
    values, mask = torch.rand(20, 33, generator=g), torch.rand(20, 33, generator=g) < 0.4
    mask[0], mask[1] = False, True
    ours = masked_quantile(values, mask, q)
    expected = [np.quantile(v[m].numpy(), q) if m.any() else 0.0 for v, m in zip(values, mask, strict=True)]
    np.testing.assert_allclose(ours.numpy(), np.array(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delta", 0),
        ("delta", -0.1),
        ("delta_b", -1),
        ("delta_b", float("inf")),  # times W_0 = 0 it is not a number, and the first token would be under no limit
        ("w_min", 0),
        ("w_min", 1.2),
        ("quantile", 2),
        ("ceiling", 0.5),
        ("max_ratio", 0),
    ],
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^CPPO\.{field} must be .* got {value}"):
        CPPO(**{field: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=rf"^SoftCPPO\.{field} must be .* got {value}"):
        SoftCPPO(**{field: value})  # pyright: ignore[reportArgumentType]


def test_a_bad_horizon_is_named() -> None:
    with pytest.raises(ConfigError, match=r"FixedHorizonCPPO\.horizon must be at least 2 tokens .* got 1"):
        FixedHorizonCPPO(horizon=1)
