from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from cppo_lightning.batch import TokenStats
from cppo_lightning.divergences import (
    BinaryKL,
    BinaryTV,
    Divergence,
    SampledK2,
    SampledK3,
    TopKKL,
    TopKTV,
    captured_mass,
)
from cppo_lightning.errors import ConfigError
from tests.worked import RESPONSES, VECTORS, from_distributions, from_probabilities, response, stack

ALL = [BinaryTV(), BinaryKL(), TopKTV(2), TopKKL(2), SampledK2(), SampledK3()]


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(
    ("divergence", "key"),
    [(BinaryTV(), "bin_tv"), (TopKTV(2), "topk_tv_union"), (BinaryKL(), "bin_kl"), (TopKKL(2), "topk_kl_union")],
)
def test_worked_vectors(name: str, divergence: Divergence, key: str) -> None:
    # 2e-7: a few float32 roundings of sums near 1
    np.testing.assert_allclose(divergence(response(name))[0].numpy(), VECTORS[f"div_{name}"][key], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("name", RESPONSES)
def test_worked_vectors_of_the_whole_distribution_and_of_samples(name: str) -> None:
    k = len(RESPONSES[name][2][0])
    stats = response(name, k)
    for divergence, expected in (
        (TopKTV(k), VECTORS[f"div_{name}"]["full_tv"]),
        (TopKKL(k), VECTORS[f"div_{name}"]["full_kl"]),
        (SampledK2(), VECTORS["trm"][name]["k2"]),
        (SampledK3(), VECTORS["trm"][name]["k3"]),
    ):
        np.testing.assert_allclose(divergence(stats)[0].numpy(), expected, rtol=1e-6, atol=2e-7)


def random_response(seed: int, vocabulary: int = 24, k: int = 24) -> tuple[torch.Tensor, torch.Tensor, TokenStats]:
    g = torch.Generator().manual_seed(seed)
    mu, pi = (torch.randn(50, vocabulary, generator=g).mul(2).softmax(-1) for _ in range(2))
    ids = torch.randint(vocabulary, (50,), generator=g)
    return mu, pi, from_distributions(mu, pi, ids, 1.0, k)


@pytest.mark.parametrize("seed", range(5))
def test_all_of_the_vocabulary_is_the_full_divergence(seed: int) -> None:
    mu, pi, stats = random_response(seed)
    torch.testing.assert_close(TopKTV(24)(stats)[0], 0.5 * (mu - pi).abs().sum(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(TopKKL(24)(stats)[0], (mu * (mu / pi).log()).sum(-1), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_more_bins_never_lower_the_divergence(seed: int) -> None:
    mu, pi, stats = random_response(seed)
    for binary, top_k, full in (
        (BinaryTV(), TopKTV, 0.5 * (mu - pi).abs().sum(-1)),
        (BinaryKL(), TopKKL, (mu * (mu / pi).log()).sum(-1)),
    ):
        ladder = [binary(stats), *(top_k(k)(stats) for k in (1, 2, 5, 12)), full[None]]
        for coarse, fine in pairwise(ladder):
            assert bool((coarse <= fine + 5e-6).all())


def test_the_mean_of_k3_is_the_divergence() -> None:
    """Over every token of the vocabulary, weighted by mu."""
    mu, pi, _ = random_response(0)
    mu, pi = mu[0], pi[0]
    every = from_distributions(mu.expand(24, -1), pi.expand(24, -1), torch.arange(24), 1.0, 24)
    torch.testing.assert_close((mu * SampledK3()(every)[0]).sum(), (mu * (mu / pi).log()).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_small_divergences_are_not_lost_to_rounding(scale: float) -> None:
    """TRM-Avg decides at 0.001 nats; here are 5e-5 and 5e-7, and a plain sum of mu log(mu / pi) in float32 is off by 1e-7."""
    mu, _, _ = random_response(1)
    g = torch.Generator().manual_seed(2)
    pi = (mu.log() + scale * torch.randn(50, 24, generator=g)).softmax(-1)
    ids = mu.argmax(-1)
    logs = mu.double().log(), pi.double().log()
    exact_kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1) - (logs[0].exp() - logs[1].exp()).sum(-1)
    stats = from_distributions(mu, pi, ids, 1.0, 24)
    # 2e-8: what float32 leaves of 1 - sum p
    torch.testing.assert_close(TopKKL(24)(stats)[0].double(), exact_kl, rtol=1e-3, atol=2e-8)


@pytest.mark.parametrize("divergence", ALL)
def test_padding_is_zero_whatever_it_holds(divergence: Divergence) -> None:
    for fill in (float("nan"), float("inf"), float("-inf"), 7e4):
        stats = stack(response("A"), response("B"), width=9, fill=fill)
        values = divergence(stats)
        assert values.dtype == torch.float32
        assert torch.equal(values[~stats.mask], torch.zeros(11))
        assert torch.equal(captured_mass(stats)[~stats.mask], torch.zeros(11))


@pytest.mark.parametrize("divergence", ALL)
def test_equal_policies_are_at_distance_zero(divergence: Divergence) -> None:
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(200, 7, generator=g).mul(12).softmax(-1)  # near-certain tokens, and ones of probability 1e-20
    ids = torch.randint(7, (200,), generator=g)
    assert torch.equal(divergence(from_distributions(mu, mu, ids, 1.0, 2)), torch.zeros(1, 200))


def test_probabilities_at_the_edges() -> None:
    stats = from_probabilities([1.0, 1e-38, 1.0, 0.0, 0.5], [1.0, 1.0, 1e-38, 0.5, 0.0], 1.0)
    np.testing.assert_allclose(BinaryTV()(stats)[0].numpy(), [0, 1, 1, 0.5, 0.5], atol=1e-7)
    # floors 1e-12 of a bin and 2^-23 of the rest: log(1e12) = 27.6 nats and log(2^23) = 15.9 are the most there is
    expected = [0, 23 * np.log(2), 12 * np.log(10), np.log(2), 0.5 * np.log(0.5e12) + 0.5 * np.log(0.5)]
    np.testing.assert_allclose(BinaryKL()(stats)[0].numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL)
def test_extreme_distributions_give_finite_numbers_that_are_not_negative(divergence: Divergence) -> None:
    g = torch.Generator().manual_seed(0)
    mu, pi = (torch.randn(500, 7, generator=g).mul(40).softmax(-1) for _ in range(2))  # zeros and ones among them
    ids = torch.randint(7, (500,), generator=g)
    assert bool((mu == 0).any() & (pi == 0).any() & (mu == 1).any())
    values = divergence(from_distributions(mu.clamp(min=1e-45), pi, ids, 1.0, 2))
    assert bool(values.isfinite().all())
    assert bool((values >= 0).all())


def test_captured_mass() -> None:
    stats = stack(response("A", 4), response("B", 4))
    np.testing.assert_allclose(captured_mass(stats, 2)[0].numpy(), [0.80, 0.80, 0.84, 0.85], rtol=1e-6)
    np.testing.assert_allclose(captured_mass(stats)[1, :3].numpy(), [0.93, 0.95, 0.98], rtol=1e-6)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"TopKTV\.k must be at least 1, got 0"):
        TopKTV(0)
    with pytest.raises(ConfigError, match=r"TopKKL\.k must be at least 1, got -3"):
        TopKKL(-3)
    for divergence in (TopKTV(), TopKKL()):
        with pytest.raises(ValueError, match="needs 20 top-K entries per token, the batch carries 2"):
            divergence(response("A"))
    with pytest.raises(ValueError, match="carries 0"):
        TopKTV()(from_probabilities([0.5], [0.4], 1.0))
    with pytest.raises(ValueError, match="the batch carries none"):
        captured_mass(from_probabilities([0.5], [0.4], 1.0))
