"""Every divergence and strategy again, slowly: one response at a time, token by token, in Python's float64.

Nothing here is shared with the package.  A decision comes with its margin, how far it is from turning over, so that a test can
leave out the few that float32 cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cppo_lightning.batch import TokenStats

FLOAT32_RESOLUTION = 2.0**-23


@dataclass(frozen=True)
class Token:
    """One trainable token: log-probabilities under mu and pi, and mu's most likely tokens as (id, log mu, log pi)."""

    id: int
    mu: float
    pi: float
    advantage: float
    top: tuple[tuple[int, float, float], ...]

    @property
    def rho(self) -> float:
        return math.exp(self.pi - self.mu)

    @property
    def toward(self) -> bool:
        return self.advantage * (self.rho - 1) <= 0


class Decision(NamedTuple):
    """``value`` is the token's part of the objective, ``weight`` what stands before ``A grad log pi``."""

    keep: bool
    weight: float
    value: float
    margin: float


def tokens(stats: TokenStats) -> list[list[Token]]:
    """The trainable tokens of each response, in order."""
    columns: list[Any] = [stats.response_ids, stats.rollout_logp, stats.logp, stats.advantages, stats.mask]
    columns += [stats.topk_ids, stats.topk_rollout_logp, stats.topk_logp]
    listed = [column.tolist() for column in columns]
    return [
        [
            Token(token, mu, pi, advantage, tuple(zip(ids, mus, pis, strict=True)))
            for token, mu, pi, advantage, trainable, ids, mus, pis in zip(*row, strict=True)
            if trainable
        ]
        for row in zip(*listed, strict=True)
    ]


# ---- divergences: one token -> a number -------------------------------------------------------------------------------


def bins(token: Token, k: int) -> list[tuple[float, float]]:
    """(mu, pi) of the k most likely tokens, the sampled one if it is another, and all others."""
    found = [(math.exp(mu), math.exp(pi)) for _, mu, pi in token.top[:k]]
    if token.id not in [i for i, _, _ in token.top[:k]]:
        found.append((math.exp(token.mu), math.exp(token.pi)))
    others = (1 - sum(mu for mu, _ in found), 1 - sum(pi for _, pi in found))
    return [*found, (max(others[0], FLOAT32_RESOLUTION), max(others[1], FLOAT32_RESOLUTION))]


def tv(k: int) -> Callable[[Token], float]:
    """k = 0 is the binary form."""
    return lambda token: 0.5 * sum(abs(mu - pi) for mu, pi in bins(token, k))


def kl(k: int) -> Callable[[Token], float]:
    return lambda token: sum(mu * math.log(mu / pi) for mu, pi in bins(token, k))


def k2(token: Token) -> float:
    return 0.5 * (token.pi - token.mu) ** 2


def k3(token: Token) -> float:
    return token.rho - 1 - (token.pi - token.mu)


# ---- strategies: the tokens of one response -> a decision for each ------------------------------------------------------

Divergence = Callable[[Token], float]


def ppo_clip(response: list[Token], low: float, high: float, dual: float = math.inf) -> list[Decision]:
    out = []
    for token in response:
        rho, advantage = token.rho, token.advantage
        clipped = min(max(rho, 1 - low), 1 + high)
        value = min(rho * advantage, clipped * advantage)
        keep = value == rho * advantage
        if advantage < 0 and value < dual * advantage:
            value, keep = dual * advantage, False
        margin = min(abs(rho - edge) for edge in (1 - low, 1 + high, dual))
        out.append(Decision(keep, rho * keep, value, margin))
    return out


def threshold_margin(token: Token, excess: float) -> float:
    """Of "dropped if it moves away and ``excess`` > 0": with rho near 1 the direction is a matter of rounding too."""
    if excess <= 0:
        return -excess
    direction = abs(token.rho - 1) or math.inf
    return direction if token.toward else min(excess, direction)


def dppo(response: list[Token], divergence: Divergence, delta: float, cap: float = math.inf) -> list[Decision]:
    out = []
    for token in response:
        distance = divergence(token)
        away = (token.advantage > 0 and token.rho > 1) or (token.advantage < 0 and token.rho < 1)
        keep = not (away and distance > delta)
        weight = min(token.rho, cap) * keep
        out.append(Decision(keep, weight, weight * token.advantage, threshold_margin(token, distance - delta)))
    return out


def trm(response: list[Token], divergence: Divergence, reduce: str, delta: float) -> list[Decision]:
    distances = [divergence(token) for token in response]
    whole = max(distances) if reduce == "max" else sum(distances) / len(distances)
    keep = whole <= delta
    return [Decision(keep, t.rho * keep, t.rho * keep * t.advantage, abs(whole - delta)) for t in response]


def both(one: list[Decision], other: list[Decision]) -> list[Decision]:
    """What both keep, at the first one's weight."""
    return [
        Decision(a.keep and b.keep, a.weight * b.keep, a.value * b.keep, min(a.margin, b.margin))
        for a, b in zip(one, other, strict=True)
    ]


def cispo(response: list[Token], least: float, most: float) -> list[Decision]:
    weights = [min(max(token.rho, least), most) for token in response]
    return [Decision(True, w, w * t.advantage * t.pi, math.inf) for w, t in zip(weights, response, strict=True)]


def minpro(response: list[Token], least: float, most: float) -> list[Decision]:
    out, smallest = [], math.inf
    for t, token in enumerate(response):
        product = token.rho * (smallest if t else 1.0)
        weight = min(max(product, least), most)
        out.append(Decision(True, weight, weight * token.advantage * token.pi, math.inf))
        smallest = min(smallest, token.rho)
    return out


def gspo(response: list[Token], low: float, high: float) -> list[Decision]:
    whole = math.exp(sum(token.pi - token.mu for token in response) / len(response))
    margin = min(abs(whole - (1 - low)), abs(whole - (1 + high)))
    out = []
    for token in response:
        value = min(whole * token.advantage, min(max(whole, 1 - low), 1 + high) * token.advantage)
        keep = value == whole * token.advantage
        out.append(Decision(keep, whole * keep, value, margin))
    return out


def sapo(response: list[Token], positive: float, negative: float) -> list[Decision]:
    out = []
    for token in response:
        tau = positive if token.advantage > 0 else negative
        soft = 1 / (1 + math.exp(-tau * (token.rho - 1)))
        out.append(Decision(True, 4 * soft * (1 - soft) * token.rho, 4 / tau * soft * token.advantage, math.inf))
    return out


def cppo(
    response: list[Token], divergence: Divergence, delta: float, delta_b: float, w_min: float, adaptive: bool
) -> list[Decision]:
    """Algorithm 1 of arXiv 2606.10968, with Eq. 22 when ``adaptive``."""
    distances, length = [divergence(token) for token in response], len(response)
    if adaptive:
        ranked, rank = sorted(distances), 0.9 * (length - 1)
        below = int(rank)
        p90 = ranked[below] + (rank - below) * (ranked[min(below + 1, length - 1)] - ranked[below])
        delta_b = min(max(p90, delta_b), 2 * delta_b)
    out, spent, allowance = [], 0.0, 0.0
    for t, (token, distance) in enumerate(zip(response, distances, strict=True), start=1):
        w = 1 - (1 - w_min) * (t - 1) / max(length - 1, 1)
        threshold = min(delta, delta + delta_b * allowance - spent)
        keep = token.toward or w * distance <= threshold
        weight = token.rho * keep
        out.append(Decision(keep, weight, weight * token.advantage, threshold_margin(token, w * distance - threshold)))
        spent, allowance = spent + w * distance, allowance + w
    return out
