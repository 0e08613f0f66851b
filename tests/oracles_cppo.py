"""CPPO and its variants token by token, in plain Python and float64, and random batches to put to both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from cppo_lightning.batch import TokenStats
from cppo_lightning.divergences import BinaryTV, Divergence, TopKKL, TopKTV
from cppo_lightning.trust_regions.cppo import CPPO
from cppo_lightning.trust_regions.fixed_horizon_cppo import FixedHorizonCPPO
from cppo_lightning.trust_regions.shuffled_cppo import ShuffledCPPO
from cppo_lightning.trust_regions.soft_cppo import SoftCPPO

WORD = 1 << 64


@dataclass(frozen=True)
class Token:
    keep: bool
    weight: float  # of A grad log pi
    threshold: float  # c_t
    margin: float  # how far the decision is from turning over


@dataclass(frozen=True)
class Response:
    """The trainable tokens of one response."""

    ids: list[int]
    advantage: float
    mu: list[list[float]]  # next-token distributions
    pi: list[list[float]]

    @property
    def ratios(self) -> list[float]:
        return [pi[y] / mu[y] for y, mu, pi in zip(self.ids, self.mu, self.pi, strict=True)]


@dataclass(frozen=True)
class Batch:
    stats: TokenStats
    responses: list[Response]  # one per row


def divergences(kind: Divergence, response: Response) -> list[float]:
    """D_t from the full distributions, bin by bin."""
    found = []
    for y, mu, pi in zip(response.ids, response.mu, response.pi, strict=True):
        likely = sorted(range(len(mu)), key=lambda v: -mu[v])[: kind.top_k]
        bins = [(mu[v], pi[v]) for v in sorted({*likely, y})]
        rest = 1 - sum(m for m, _ in bins), 1 - sum(p for _, p in bins)
        if len(bins) < len(mu):
            bins.append(rest)
        if isinstance(kind, TopKTV | BinaryTV):
            found.append(sum(abs(m - p) for m, p in bins) / 2)
        else:
            found.append(sum(m * math.log(m / p) for m, p in bins))
    return found


def algorithm_1(c: CPPO, divergence: list[float], ratios: list[float], advantage: float, ids: list[int]) -> list[Token]:
    """Algorithm 1 for one response, or Appendix C for the soft variant; prefix sums are of D_t - noise."""
    weights = position_weights(c, ids)
    delta_b = c.delta_b
    if delta_b is not None and c.adaptive and divergence:
        delta_b = min(max(float(np.quantile([d - c.noise for d in divergence], c.quantile)), delta_b), c.ceiling * delta_b)
    spent = allowance = gross = 0.0
    out = []
    for d, w, rho in zip(divergence, weights, ratios, strict=True):
        z = w * d
        allowed = math.inf if delta_b is None else c.delta + delta_b * allowance
        threshold = min(c.delta, allowed - spent)
        toward = advantage * (rho - 1) <= 0
        keep = toward or z <= threshold
        weight = rho if c.max_ratio is None else min(rho, c.max_ratio)
        gross += z
        if isinstance(c, SoftCPPO):
            x = max(z / c.delta, gross / (allowed + c.noise * allowance))
            weight *= 1.0 if toward or x == 0 else min(1.0, 1 / x)
        elif not keep:
            weight = 0.0
        spent, allowance = spent + w * (d - c.noise), allowance + w
        out.append(Token(keep, weight, threshold, min(abs(z - threshold), abs(rho - 1))))
    return out


def position_weights(c: CPPO, ids: list[int]) -> list[float]:
    count = len(ids)
    if isinstance(c, FixedHorizonCPPO):
        return [max(c.w_min, 1 - (1 - c.w_min) * t / (c.horizon - 1)) for t in range(count)]
    weights = [1.0 if count == 1 else 1 - (1 - c.w_min) * t / (count - 1) for t in range(count)]
    if not isinstance(c, ShuffledCPPO):
        return weights
    response = split_mix(split_mix(c.seed) + sum(split_mix(y + (t << 32)) for t, y in enumerate(ids)))
    ranks = sorted(range(count), key=lambda t: split_mix(response + t) >> 33)
    return [weights[ranks.index(t)] for t in range(count)]


def split_mix(x: int) -> int:
    """SplitMix64 as its authors print it (OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def random_batch(seed: int, vocabulary: int | None = None, k: int | None = None) -> Batch:
    """Ragged rows with untrained tokens inside, some without any token, both signs of advantage, and garbage where masked."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    rows, width, vocabulary = number(1, 4), number(1, 14), vocabulary or number(2, 8)
    k = k or number(1, vocabulary)
    logits = torch.randn(rows, width, vocabulary, generator=g, dtype=torch.float64).mul(1.5)
    drift = 1.5 * torch.rand(rows, 1, 1, generator=g) * torch.rand(rows, width, 1, generator=g)
    mu = logits.softmax(-1)
    pi = (logits + drift * torch.randn(logits.shape, generator=g)).softmax(-1)
    ids = mu.flatten(0, 1).multinomial(1, generator=g).view(rows, width)
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=g)
    mask &= torch.rand(rows, width, generator=g) > 0.1
    advantages = torch.randn(rows, generator=g)
    top = mu.argsort(descending=True, stable=True)[..., :k]
    stats = TokenStats(
        response_ids=ids,
        logp=pi.gather(-1, ids[..., None]).squeeze(-1).log().float(),
        rollout_logp=mu.gather(-1, ids[..., None]).squeeze(-1).log().float(),
        advantages=advantages[:, None].repeat(1, width),
        mask=mask,
        topk_ids=top,
        topk_rollout_logp=mu.gather(-1, top).log().float(),
        topk_logp=pi.gather(-1, top).log().float(),
    )
    responses = [
        Response(ids[i, mask[i]].tolist(), float(advantages[i]), mu[i, mask[i]].tolist(), pi[i, mask[i]].tolist())
        for i in range(rows)
    ]
    return Batch(spoil(stats), responses)


def spoil(stats: TokenStats) -> TokenStats:
    """The same statistics with inf, NaN and id -100 wherever the mask is False."""
    hole = ~stats.mask
    bad = [math.nan, math.inf, -math.inf, 3.0]

    def fill(values: torch.Tensor | None, start: int) -> torch.Tensor | None:
        if values is None:
            return None
        garbage = torch.tensor(bad[start:] + bad[:start])[torch.arange(hole.numel()).view(hole.shape) % 4]
        if not values.is_floating_point():
            garbage = torch.full_like(hole, -100, dtype=torch.int64)
        shape = (*hole.shape, *(1,) * (values.dim() - 2))
        return torch.where(hole.view(shape), garbage.view(shape), values)

    return replace(stats, **{name: fill(v, i % 4) for i, (name, v) in enumerate(vars(stats).items()) if name != "mask"})


@lru_cache(maxsize=1)
def thousand_batches() -> list[Batch]:
    return [random_batch(seed) for seed in range(1000)]


def top_k_of(divergence: Divergence, k: int) -> Divergence:
    """The divergence with as many top-K entries as a batch carries, if it reads any."""
    return replace(divergence, k=k) if isinstance(divergence, TopKTV | TopKKL) else divergence
