from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from cppo_lightning.batch import TokenStats
from cppo_lightning.divergences import BinaryTV, Divergence, TopKTV
from cppo_lightning.errors import ConfigError
from tests.worked import RESPONSES, VECTORS, from_distributions, from_probabilities, response, stack


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(("divergence", "key"), [(BinaryTV(), "bin_tv"), (TopKTV(2), "topk_tv_union")])
def test_worked_vectors(name: str, divergence: Divergence, key: str) -> None:
    # 2e-7: a few float32 roundings of sums near 1
    np.testing.assert_allclose(divergence(response(name))[0].numpy(), VECTORS[f"div_{name}"][key], atol=2e-7)


def random_response(seed: int, vocabulary: int = 24, k: int = 24) -> tuple[torch.Tensor, torch.Tensor, TokenStats]:
    g = torch.Generator().manual_seed(seed)
    mu, pi = (torch.randn(50, vocabulary, generator=g).mul(2).softmax(-1) for _ in range(2))
    ids = torch.randint(vocabulary, (50,), generator=g)
    return mu, pi, from_distributions(mu, pi, ids, 1.0, k)


@pytest.mark.parametrize("seed", range(5))
def test_all_of_the_vocabulary_is_the_full_total_variation(seed: int) -> None:
    mu, pi, stats = random_response(seed)
    torch.testing.assert_close(TopKTV(24)(stats)[0], 0.5 * (mu - pi).abs().sum(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_more_bins_never_lower_the_divergence(seed: int) -> None:
    mu, pi, stats = random_response(seed)
    ladder = [BinaryTV()(stats), *(TopKTV(k)(stats) for k in (1, 2, 5, 12)), 0.5 * (mu - pi).abs().sum(-1)[None]]
    for coarse, fine in pairwise(ladder):
        assert bool((coarse <= fine + 1e-6).all())


@pytest.mark.parametrize("divergence", [BinaryTV(), TopKTV(2)])
def test_padding_is_zero_whatever_it_holds(divergence: Divergence) -> None:
    stats = stack(response("A"), response("B"), width=9, fill=float("nan"))
    values = divergence(stats)
    assert values.dtype == torch.float32
    assert torch.equal(values[~stats.mask], torch.zeros(11))


def test_probabilities_at_the_edges() -> None:
    stats = from_probabilities([1.0, 1e-38, 1.0], [1.0, 1.0, 1e-38], 1.0)
    np.testing.assert_allclose(BinaryTV()(stats)[0].numpy(), [0, 1, 1], atol=1e-7)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"TopKTV\.k must be at least 1, got 0"):
        TopKTV(0)
    with pytest.raises(ValueError, match="needs 20 top-K entries per token, the batch carries 2"):
        TopKTV()(response("A"))
    with pytest.raises(ValueError, match="carries 0"):
        TopKTV()(from_probabilities([0.5], [0.4], 1.0))
