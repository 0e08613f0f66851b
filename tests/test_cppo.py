"""CPPO against the worked vectors and against a per-token loop written from Algorithm 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cppo_lightning.batch import TokenStats
from cppo_lightning.divergences import BinaryTV, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.losses import LossAggregation, Totals, policy_gradient_loss, surrogate_value
from cppo_lightning.trust_regions import CPPO
from cppo_lightning.trust_regions.cppo import masked_quantile
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


def oracle(stats: TokenStats, row: int, c: CPPO) -> dict[str, list[float]]:
    """Algorithm 1 for one response, token by token, in float64."""
    positions = [t for t in range(stats.mask.shape[1]) if stats.mask[row, t]]
    divergence = c.divergence(stats)[row].double()
    d = [float(divergence[t]) for t in positions]
    total = len(d)
    delta_b = c.delta_b
    if c.adaptive:
        delta_b = min(max(float(np.quantile(d, c.quantile)), c.delta_b), c.ceiling * c.delta_b)
    spent = allowance = 0.0
    out: dict[str, list[float]] = {"keep": [], "threshold": [], "margin": []}
    for t, position in enumerate(positions, start=1):
        w = 1.0 if total == 1 else 1 - (1 - c.w_min) * (t - 1) / (total - 1)
        z = w * d[t - 1]
        threshold = min(c.delta, c.delta + delta_b * allowance - spent)
        rho = float(stats.ratio[row, position])
        out["keep"].append(float(stats.advantages[row, position] * (rho - 1) <= 0 or z <= threshold))
        out["threshold"].append(threshold)
        out["margin"].append(abs(z - threshold))
        spent, allowance = spent + z, allowance + w
    return out


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
    for row in range(len(stats.mask)):
        expected, own = oracle(stats, row, cppo), stats.mask[row]
        np.testing.assert_allclose(gate.diagnostics["threshold"][row, own].numpy(), expected["threshold"], atol=3e-6)
        # a decision may differ only where float32 cannot tell Z_t from c_t
        certain = np.array(expected["margin"]) > 3e-6
        np.testing.assert_array_equal(gate.keep[row, own].numpy()[certain], np.array(expected["keep"], bool)[certain])
    dropped = stats.mask & ~gate.keep
    assert dropped.any(), "a batch in which nothing is dropped tests nothing"
    assert torch.equal(dropped, gate.diagnostics["masked_by_position"] | gate.diagnostics["masked_by_budget"])


def test_paddings_and_row_order_change_nothing() -> None:
    stats = random_stats(3)
    wide = stack(*[TokenStats(**{k: v[i : i + 1] for k, v in vars(stats).items()}) for i in (5, 0, 7)], width=91)
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
        ("w_min", 0),
        ("w_min", 1.2),
        ("quantile", 2),
        ("ceiling", 0.5),
        ("max_ratio", 0),
    ],
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"CPPO\.{field} must be .* got {value}"):
        CPPO(**{field: value})  # pyright: ignore[reportArgumentType]
