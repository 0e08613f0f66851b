"""Rules on optimizer steps.  They watch what the module logs at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cppo_lightning.callbacks.explanations.rule import Explanation, Rule, Seen
from cppo_lightning.errors import ConfigError


@dataclass(frozen=True)
class ZeroLoss(Rule):
    """The loss is 0 at an update with the weights that sampled, by design.

    Args:
        largest: loss that looks like 0.  Numerics leave 1e-8 to 1e-5; what responses of unequal lengths leave with
            ``aggregation.kind: token-mean`` is larger and alarms nobody.

    Raises:
        ConfigError: ``largest`` not above 0.
    """

    watches: ClassVar = ("train/loss", "train/grad_norm")
    largest: float = 1e-4

    def __post_init__(self) -> None:
        if not self.largest > 0:
            raise ConfigError(f"ZeroLoss.largest must be above 0 (usual: 1e-4), got {self.largest}")

    def __call__(self, seen: Seen) -> Explanation | None:
        loss, grad_norm = (seen.latest[tag] for tag in self.watches)
        on_policy = seen.setting("data.rollout.version") == seen.step
        # with a gradient of 0 the run would be broken indeed
        if not on_policy or abs(loss) > self.largest or not grad_norm > 0:
            return None
        return Explanation(
            f"`train/loss` is {loss + 0.0:.1g} at a rollout's first update, and `train/grad_norm` is {grad_norm:.2g}",
            "nothing is broken: the policy is still the one that sampled, so all ratios are 1, and the advantages of a group "
            "sum to 0. The loss is their sum; its gradient, which is what trains, is not 0",
            "nothing; watch `rollout/reward` and `eval/`, since this loss never says whether the model learns",
        )


@dataclass(frozen=True)
class LowEntropy(Rule):
    """The policy has become nearly certain of every token.

    Args:
        share: of the entropy at the run's first step.  Any run that learns lowers it, so this asks for much more than that.

    Raises:
        ConfigError: ``share`` not in (0, 1].
    """

    watches: ClassVar = ("train/entropy",)
    share: float = 0.15

    def __post_init__(self) -> None:
        self.check_shares()

    def __call__(self, seen: Seen) -> Explanation | None:
        now, first = seen.latest["train/entropy"], seen.first["train/entropy"]
        if now >= self.share * first:
            return None
        reward = seen.latest.get("rollout/reward")
        return Explanation(
            f"`train/entropy` is {now:.2g} nats per token, {now / first:.0%} of the {first:.2g} at the run's first step"
            f"{'' if reward is None else f', at a mean reward of {reward:.2f}'}",
            "a group's responses become the same, their rewards equal, and nothing is left to learn from; harmless if the "
            "reward is as high as it can be",
            f"{seen.gentler()}; a tighter trust region, `model.trust_region.init_args`; `model.reference_kl: {{coef: 0.001}}`; "
            "or go on from an earlier checkpoint",
        )
