"""Mismatch metrics against loops, exact distributions and real engines; the prefix budget net of numerics."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoTokenizer

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import LogProbGap, Mismatch
from cppo_lightning.callbacks.mismatch import mismatch_maxima, mismatch_totals
from cppo_lightning.divergences import BinaryTV, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import Totals, WeightedMeans, bin_names
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import RolloutPlan, Sampling, TransformersEngine, VLLMEngine
from cppo_lightning.trust_regions import CPPO, DPPO, TRM, PPOClip, TrustRegion
from cppo_lightning.trust_regions.fixed_horizon_cppo import FixedHorizonCPPO
from cppo_lightning.trust_regions.soft_cppo import SoftCPPO
from tests.callback_rig import scalars
from tests.oracles_cppo import algorithm_1, divergences, thousand_batches
from tests.test_cppo import on, random_stats
from tests.test_fit import make_data, make_module, make_trainer

BINS = 4
REGION = CPPO(TopKTV(5))


def means(totals: Totals) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in totals.items() if float(count)}


def slow(stats: TokenStats, gate: Gate, region: CPPO) -> dict[str, float]:
    """Every metric as its docstring words it, token by token."""
    found: dict[str, list[float]] = {}
    gaps: list[list[float]] = [[] for _ in range(BINS)]

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for b, own in enumerate(stats.mask):
        columns = own.nonzero().flatten().tolist()
        weights = [1 - (1 - region.w_min) * t / max(1, len(columns) - 1) for t in range(len(columns))]
        product = 1.0
        spent = 0.0
        for t, column in enumerate(columns):
            pi, mu = math.exp(float(stats.logp[b, column])), math.exp(float(stats.rollout_logp[b, column]))
            r, d = pi / mu, float(gate.diagnostics["divergence"][b, column])
            product, spent = product * r, spent + weights[t] * d
            gaps[BINS * t // len(columns)].append(abs(math.log(r)))
            note("logp_gap", abs(math.log(r)))
            note("prob_gap", abs(pi - mu))
            note("k3", r - 1 - math.log(r))
            note("chi2", (r - 1) ** 2)
            note("divergence", d)
            note("threshold_spent", d / (region.delta / weights[t]))
            note("budget_rate", d / float(gate.diagnostics["delta_b"][b]))
            note("masked", float(not gate.keep[b, column]))
        if columns:
            note("sequence_chi2", (product - 1) ** 2)
            allowed = region.delta + float(gate.diagnostics["delta_b"][b]) * sum(weights[:-1])
            note("budget_spent", spent / allowed)
    out = {name: sum(values) / len(values) for name, values in found.items()}
    both = ("logp_gap", "prob_gap", "divergence", "threshold_spent", "budget_spent")
    out |= {f"{name}_max": max(found[name]) for name in both}
    out |= {f"{kind}ess": 1 / (1 + out[f"{kind}chi2"]) for kind in ("", "sequence_")}
    out |= {f"logp_gap_at/{name}": sum(gaps[i]) / len(gaps[i]) for i, name in enumerate(bin_names(BINS)) if gaps[i]}
    for name in both:
        out[f"{name}_mean"] = out.pop(name)
    return {f"mismatch/{name}": value for name, value in out.items()}


def cut(stats: TokenStats, rows: list[int]) -> TokenStats:
    return replace(stats, **{name: value[rows] for name, value in vars(stats).items() if value is not None})


@pytest.mark.parametrize("seed", range(5))
def test_every_metric_equals_a_loop_over_tokens(seed: int) -> None:
    stats = random_stats(seed)
    gate = REGION(stats)
    ours = means(mismatch_totals(stats, gate, REGION.delta, BINS))
    ours |= {name: float(value) for name, value in mismatch_maxima(stats, gate, REGION.delta).items()}
    expected = slow(stats, gate, REGION)
    assert set(ours) == {*expected, "mismatch/captured_mass"}
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name  # sums of float32 log-ratios over 40 tokens
    mass = [float(stats.topk_rollout_logp[b, t].exp().sum()) for b, t in stats.mask.nonzero().tolist()]  # type: ignore[index]
    assert ours["mismatch/captured_mass"] == pytest.approx(sum(mass) / len(mass), rel=1e-5)
    assert expected["mismatch/masked"] > 0
    assert 0 < ours["mismatch/sequence_ess"] < ours["mismatch/ess"] < 1


def test_micro_batches_and_rows_without_tokens_change_no_metric() -> None:
    stats = random_stats(7)
    whole, parts = WeightedMeans(_names(stats)), WeightedMeans(_names(stats))
    whole.update(mismatch_totals(stats, REGION(stats), REGION.delta, BINS))
    blank = replace(cut(stats, [3]), mask=torch.zeros(1, 40, dtype=torch.bool))
    for part in (cut(stats, [5, 0, 2]), blank, cut(stats, [1, 3, 4, 6, 7, 8, 9, 10, 11])):
        parts.update(mismatch_totals(part, REGION(part), REGION.delta, BINS))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def _names(stats: TokenStats) -> list[str]:
    return list(mismatch_totals(stats, REGION(stats), REGION.delta, BINS))


def test_k3_and_chi2_are_those_of_the_distributions() -> None:
    """With every token as often as mu says, the means over the sample are the expectations under mu."""
    counts = torch.tensor([10, 6, 3, 1])
    mu, pi = counts.double() / 20, torch.tensor([0.4, 0.35, 0.15, 0.1], dtype=torch.float64)
    ids = torch.arange(4).repeat_interleave(counts)[:, None]  # twenty responses of one token
    ones = torch.ones(20, 1)
    stats = TokenStats(ids, pi.log()[ids].float(), mu.log()[ids].float(), ones, ones.bool())
    found = means(mismatch_totals(stats, DPPO(BinaryTV())(stats), 0.15, BINS))
    chi2 = float((pi**2 / mu).sum() - 1)
    assert found["mismatch/k3"] == pytest.approx(float((mu * (mu / pi).log()).sum()), rel=1e-5)
    for kind in ("", "sequence_"):
        assert found[f"mismatch/{kind}chi2"] == pytest.approx(chi2, rel=1e-5)
        assert found[f"mismatch/{kind}ess"] == pytest.approx(1 / (1 + chi2), rel=1e-5)


def test_small_gaps_are_not_lost_to_rounding() -> None:
    """At 4e-6 nats, what float32 engines show, r - 1 - log r in float32 would be noise of 1e-7."""
    gap = 2.0**-18
    ones = torch.ones(1, 5)
    stats = TokenStats(ones.long(), -2 * ones + gap, -2 * ones, ones, ones.bool())
    found = means(mismatch_totals(stats, PPOClip()(stats), None, BINS))
    assert found["mismatch/k3"] == pytest.approx(gap**2 / 2, rel=0.05)
    assert found["mismatch/chi2"] == pytest.approx(gap**2, rel=1e-4)


def test_ratios_beyond_every_number_stay_numbers() -> None:
    ones = torch.ones(2, 3)
    near, far = torch.full((1, 3), -0.1), torch.full((1, 3), -200.0)
    stats = TokenStats(ones.long(), torch.cat([near, far]), torch.cat([far, near]), ones, ones.bool())
    found = means(mismatch_totals(stats, PPOClip()(stats), None, BINS))
    assert all(math.isfinite(value) for value in found.values())
    assert found["mismatch/ess"] < 1e-20
    assert found["mismatch/logp_gap_mean"] == pytest.approx(199.9)


@pytest.mark.parametrize(
    ("region", "has"),
    [
        (CPPO(delta_b=None), {"divergence", "threshold_spent"}),
        (DPPO(BinaryTV()), {"divergence", "threshold_spent"}),
        (TRM(delta=0.05), {"divergence"}),
        (PPOClip(), set()),
    ],
    ids=["CPPO without budget", "DPPO", "TRM", "PPO"],
)
def test_only_limits_that_a_trust_region_has_are_reported(region: Any, has: set[str]) -> None:
    stats = random_stats(3)
    region = replace(region, divergence=TopKTV(5)) if region.__class__ in (CPPO, TRM) else region
    gate = region(stats)
    maxima = mismatch_maxima(stats, gate, region.token_threshold)
    assert {name.removeprefix("mismatch/").removesuffix("_max") for name in maxima} == {"logp_gap", "prob_gap", *has}
    found = means(mismatch_totals(stats, gate, region.token_threshold, BINS))
    assert ("mismatch/threshold_spent_mean" in found) is ("threshold_spent" in has)
    assert not any("budget" in name for name in found)
    if isinstance(region, DPPO):
        assert found["mismatch/threshold_spent_mean"] == pytest.approx(found["mismatch/divergence_mean"] / 0.15)


NEEDS = {
    "budget_spent_mean": {"budget_spent"},
    "budget_rate": {"divergence", "delta_b"},
    "divergence_mean": {"divergence"},
    "threshold_spent_mean": {"divergence"},
}
TOLD = ("budget_spent", "delta_b", "divergence")


@pytest.mark.parametrize("told", [c for n in range(4) for c in combinations(TOLD, n)], ids="+".join)
def test_a_trust_region_may_tell_a_part_of_what_there_is(told: tuple[str, ...]) -> None:
    stats = random_stats(3)
    whole = replace(REGION, w_min=1.0)(stats)  # so that D_t is the weighted one
    gate = Gate(whole.weight, whole.keep, {name: whole.diagnostics[name] for name in told})
    found, expected = (mismatch_totals(stats, g, REGION.delta, BINS) for g in (gate, whole))
    for name, needs in NEEDS.items():
        assert (f"mismatch/{name}" in found) is (needs <= set(told)), name
    assert means(found) == {name: value for name, value in means(expected).items() if name in found}
    maxima = {name.removeprefix("mismatch/") for name in mismatch_maxima(stats, gate, REGION.delta)}
    assert {"budget_spent_max", "divergence_max"} & maxima == {f"{name}_max" for name in told if name != "delta_b"}


@dataclass(frozen=True)
class Twice(DPPO):
    """Its threshold is not what its setting says."""

    @property
    def token_threshold(self) -> float:
        return 2 * self.delta


def test_a_threshold_is_what_the_trust_region_says_it_is() -> None:
    stats, region, callback = random_stats(3), Twice(BinaryTV()), Mismatch(BINS)
    module: Any = SimpleNamespace(trust_region=region)
    callback.setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    found = means(callback.totals(stats, region(stats)))
    assert found["mismatch/threshold_spent_mean"] == pytest.approx(found["mismatch/divergence_mean"] / (2 * region.delta))


def measured(path: Path, folder: Path, region: TrustRegion, dtype: Any, ahead: int = 0) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of two rollouts of two updates each."""
    plan = RolloutPlan(prompts=4, samples=4, updates=2, max_staleness=ahead)
    data, module = make_data(path, engine=TransformersEngine(dtype), plan=plan), make_module(path, trust_region=region)
    logger = TensorBoardLogger(folder, name="", version="run")
    callbacks = [Mismatch(bins=BINS), LogProbGap()]
    make_trainer(folder, callbacks, rollouts=2, logger=logger).fit(module, datamodule=data)
    data.close()
    return scalars(folder)


def test_a_real_engine_is_measured_at_each_rollouts_first_update(tiny_model_path: Path, tmp_path: Path) -> None:
    region = CPPO(TopKTV(5), adaptive=False)
    exact = measured(tiny_model_path, tmp_path / "float32", region, "float32")
    coarse = measured(tiny_model_path, tmp_path / "bfloat16", region, "bfloat16")
    for found in (exact, coarse):
        tags = [tag for tag in found if tag.startswith("mismatch/")]
        assert len(tags) == 13 + 5 + BINS  # means, maxima, and slices of the response
        # LogProbGap writes four of the tags a second time, and the same values
        assert all(sorted(set(found[tag])) == found[tag][:: len(found[tag]) // 2] for tag in tags)
        assert all([step for step, _ in found[tag]][:: len(found[tag]) // 2] == [0, 2] for tag in tags)
        assert sum(len(found[tag]) == 4 for tag in tags) == 4
        rate, divergence = dict(found["mismatch/budget_rate"]), dict(found["mismatch/divergence_mean"])
        assert all(rate[step] == pytest.approx(divergence[step] / region.delta_b) for step in (0, 2))  # type: ignore[operator]
    for tag, bound in {"logp_gap_mean": 1e-4, "logp_gap_max": 1e-3, "budget_rate": 1e-2, "threshold_spent_max": 1e-2}.items():
        for (_, small), (_, large) in zip(exact[f"mismatch/{tag}"], coarse[f"mismatch/{tag}"], strict=True):
            assert 0 < small < bound
            assert large > 20 * small, f"{tag}: bf16 should show"


def test_learning_is_not_counted_as_numerics(tiny_model_path: Path, tmp_path: Path) -> None:
    """The second rollout, drawn ahead, is two steps old at its first update."""
    found = measured(tiny_model_path, tmp_path, CPPO(TopKTV(5)), "float32", ahead=1)
    assert {step for tag, values in found.items() if tag.startswith("mismatch/") for step, _ in values} == {0}
    assert [step for step, _ in found["train/loss"]] == [0, 1, 2, 3]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_agrees_in_float32_and_the_metrics_show_what_bfloat16_costs(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 2,000 tokens of SmolLM2 at equal weights, with the code of benchmarks/mismatch.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("mismatch")
    policy = Policy.load(PolicyConfig(str(smollm2_path)))
    prompts = benchmark.encoded(AutoTokenizer.from_pretrained(smollm2_path))
    found = {}
    for dtype, samples in (("float32", 5), ("bfloat16", 2)):
        engine = VLLMEngine(dtype, max_model_len=512)
        engine.start(str(smollm2_path))
        engine.load_weights(policy.named_weights(), 0)
        found[dtype] = benchmark.measure(engine, policy, prompts, samples, Sampling(128, temperature=0.8))
        engine.close()
    exact, coarse = found["float32"], found["bfloat16"]
    assert exact["tokens"] > 2000
    assert exact["mismatch/logp_gap_mean"] < 1e-4
    assert exact["mismatch/logp_gap_max"] < 1e-3
    assert exact["mismatch/budget_rate"] < 1e-3
    assert exact["mismatch/masked"] == 0
    assert 0.01 < coarse["mismatch/logp_gap_mean"] < 0.1  # 0.032 met
    assert 0.3 < coarse["mismatch/budget_rate"] < 1.2  # 0.75 met
    assert coarse["mismatch/threshold_spent_max"] > 0.2  # 0.64 met
    assert coarse["mismatch/sequence_ess"] < 0.98 < coarse["mismatch/ess"]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Mismatch\.bins must be from 1 to 100 .* got 0"):
        Mismatch(bins=0)
    with pytest.raises(ConfigError, match=r"CPPO\.noise must be at least 0 .* got -0\.01"):
        CPPO(noise=-0.01)


NET = {
    "fixed": CPPO(BinaryTV(), adaptive=False, noise=0.05),
    "adaptive": CPPO(noise=0.03),
    "median, horizon": FixedHorizonCPPO(quantile=0.5, ceiling=5.0, horizon=9, w_min=0.3, noise=0.05),
    "soft": SoftCPPO(noise=0.05),
}


@pytest.mark.parametrize("name", NET)
def test_a_net_budget_equals_a_loop_over_tokens(name: str) -> None:
    """The loop subtracts the noise from each D_t of its prefix sums; and the noise decides about some tokens."""
    turned = 0
    for batch in thousand_batches()[:400]:
        cppo = on(NET[name], batch.stats)
        gate, gross = cppo(batch.stats), replace(cppo, noise=0.0)(batch.stats)
        turned += int((gate.keep != gross.keep).sum())
        for i, (own, row) in enumerate(zip(batch.stats.mask, batch.responses, strict=True)):
            expected = algorithm_1(cppo, divergences(cppo.divergence, row), row.ratios, row.advantage, row.ids)
            np.testing.assert_allclose(
                gate.diagnostics["threshold"][i, own].numpy(), [token.threshold for token in expected], atol=5e-6
            )
            for token, weight, keep in zip(expected, gate.weight[i, own].tolist(), gate.keep[i, own].tolist(), strict=True):
                if token.margin > 5e-6:  # float32 cannot tell Z_t from c_t any closer
                    assert keep is token.keep
                    assert weight == pytest.approx(token.weight, rel=2e-5, abs=1e-6)
    assert turned > 20


def test_a_fixed_budget_net_of_noise_is_the_larger_budget_bit_for_bit() -> None:
    stats = random_stats(11)
    net, larger = CPPO(TopKTV(5), delta_b=0.5, noise=0.25, adaptive=False), CPPO(TopKTV(5), delta_b=0.75, adaptive=False)
    ours, expected = net(stats), larger(stats)
    assert torch.equal(ours.weight, expected.weight)
    assert all(torch.equal(ours.diagnostics[name], value) for name, value in expected.diagnostics.items())


def test_numerics_alone_never_use_up_a_budget_that_is_net_of_them() -> None:
    """A long response whose every token differs by the noise: twice delta_b exhausts the budget, and net of it nothing does."""
    ones = torch.ones(1, 4000)
    stats = TokenStats(ones.long(), (0.54 * ones).log(), (0.5 * ones).log(), ones, ones.bool())
    paper, net = CPPO(BinaryTV(), adaptive=False), CPPO(BinaryTV(), adaptive=False, noise=0.04)
    assert float(paper(stats).keep.float().mean()) < 0.01
    assert bool(paper(stats).diagnostics["budget_exhausted"])
    assert bool(net(stats).keep.all())
    torch.testing.assert_close(net(stats).diagnostics["threshold"], ones * net.delta)
