"""Rules on the trust region: how far the policy is from mu, what numerics make of that, and what is left to learn from.

Theirs are the tags of ``Divergence``, ``Mismatch``, ``BudgetExhaustion`` and ``MaskRate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cppo_lightning.callbacks.explanations.rule import Explanation, Rule, Seen

DIVERGENCE, NUMERICS = "trust_region/divergence_mean", "mismatch/divergence_mean"
REGION = "model.trust_region.init_args"


@dataclass(frozen=True)
class LargeDivergence(Rule):
    """The mean token's divergence is no longer small beside the threshold delta.

    Args:
        share: of delta.  Adaptive budgets end at 2 x 0.02 per token, 0.27 of delta = 0.15: above that a mean response is out of
            any budget, and a threshold that is met by the mean token is a limit on all and not on outliers.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (DIVERGENCE,)
    share: float = 0.3

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        divergence, delta = seen.latest[DIVERGENCE], seen.setting("model.trust_region.token_threshold")
        if delta is None or divergence < self.share * delta:
            return None
        numerics = seen.latest.get(NUMERICS)
        return Explanation(
            f"the mean divergence of pi from mu is {divergence:.2g} (`{DIVERGENCE}`), {divergence / delta:.0%} of the trust "
            f"region's delta = {delta:g}{'' if numerics is None else f'; numerics alone make {numerics:.1g} of it'}",
            "steps are so large that the trust region holds back ordinary tokens, where it should only catch outliers",
            f"{seen.gentler()}; `model.max_grad_norm: 1.0` or less",
        )


@dataclass(frozen=True)
class LargeMismatch(Rule):
    """Engine and trainer disagree so much at equal weights that numerics alone use up the trust region.

    Args:
        share: of delta_b, or of the threshold where that is more, for the mean token.  A float32 engine uses a ten-thousandth,
            a bfloat16 one beside a float32 trainer three quarters of delta_b = 0.02 (benchmarks/mismatch.py).

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = (NUMERICS,)
    share: float = 0.25

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        numerics = seen.latest[NUMERICS]
        used = {
            "prefix budget delta_b": seen.latest.get("mismatch/budget_rate", 0.0),
            "token threshold": seen.latest.get("mismatch/threshold_spent_mean", 0.0),
        }
        limit, most = max(used.items(), key=lambda item: item[1])
        if most < self.share:
            return None
        return Explanation(
            f"with equal weights, engine and trainer are {numerics:.2g} apart at the mean token (`{NUMERICS}`), {most:.0%} of "
            f"its {limit}",
            "no learning is in that: kernels and precision differ. The trust region drops tokens for it, most of them late in "
            "long responses",
            "`data.engine.init_args.dtype: float32` for a small model, or the trainer's precision for both; with CPPO "
            f"`{REGION}.noise: {numerics:.2g}`, which counts the budget net of it",
        )


@dataclass(frozen=True)
class EarlyExhaustion(Rule):
    """Most responses run out of prefix budget in their first part.

    Args:
        share: of the responses that run out at all; half, so that it is the usual response.
        place: mean relative position where they do; what comes later than a quarter leaves most tokens free to learn.

    Raises:
        ConfigError: ``share`` or ``place`` not in (0, 1].
    """

    watches: ClassVar = ("budget/exhausted_share", "budget/first_exhausted", "budget/delta_b")
    share: float = 0.5
    place: float = 0.25

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        exhausted, first, delta_b = (seen.latest[tag] for tag in self.watches)
        if exhausted < self.share or first > self.place:
            return None
        # logged together with what is watched: the divergence, another callback's, may still be that of the step before
        used, rate = seen.latest.get("budget/spent_mean"), seen.latest.get("mismatch/budget_rate")
        spent = "" if used is None else f", and a response spends {used:.3g} times what it may (`budget/spent_mean`)"
        numerics = "" if rate is None else f"; numerics alone spend {rate:.0%} of what it adds (`mismatch/budget_rate`)"
        return Explanation(
            f"{exhausted:.0%} of the responses run out of prefix budget (`budget/exhausted_share`), on average {first:.0%} "
            f"into their length (`budget/first_exhausted`); a token adds {delta_b:.2g} to the budget{spent}{numerics}",
            "after that point only tokens that go back towards mu are trained on, or those that the budget has recovered for: "
            "what long responses could teach is mostly dropped",
            f"{seen.gentler()}; or {seen.scaled(f'{REGION}.delta_b', 1.5)}",
        )


@dataclass(frozen=True)
class MostlyDropped(Rule):
    """Nearly all tokens that would move away from mu are dropped.

    Args:
        share: dropped tokens by those that do not go back towards mu, which are about half of all.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = ("mask/rate", "mask/toward")
    share: float = 0.8

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        rate, toward = (seen.latest[tag] for tag in self.watches)
        if rate == 0 or rate < self.share * (1 - toward):
            return None
        return Explanation(
            f"the trust region dropped {rate:.0%} of the tokens (`mask/rate`), while {1 - toward:.0%} would move away from mu",
            "this update went back towards the policy that sampled, and hardly anything new was learned by it",
            f"{seen.gentler()}; or a wider trust region under `{REGION}`",
        )
