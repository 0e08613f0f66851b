"""Advantages from a table of rewards, one row per prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class AdvantageEstimator(ABC):
    """Turns the rewards of a group into one advantage per response."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """``[P, G]`` float32 rewards (P prompts, G samples each) to ``[P, G]`` advantages."""


@dataclass(frozen=True)
class GroupRelative(AdvantageEstimator):
    """A_i = (R_i - mean) / (std + eps) over a prompt's samples (GRPO, arXiv 2402.03300).

    Dr.GRPO (arXiv 2503.20783) is ``GroupRelative(normalize_std=False)`` with the aggregation ``seq-mean-token-sum-norm``, whose
    horizon is the longest response allowed.

    Args:
        normalize_std: divide by the unbiased standard deviation; False gives A_i = R_i - mean.
        eps: added to the standard deviation.

    Raises:
        ConfigError: ``eps`` below 0.
    """

    normalize_std: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ConfigError(f"GroupRelative.eps must be at least 0, got {self.eps}")

    def __call__(self, rewards: Tensor) -> Tensor:
        centred = rewards - rewards.mean(-1, keepdim=True)
        if not self.normalize_std or rewards.shape[-1] == 1:
            return centred
        return centred / (rewards.std(-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
    """A_i = R_i - mean of the group's other rewards (RLOO, arXiv 2402.14740), which is (R_i - mean) G / (G - 1).

    The baseline does not depend on the response that it is subtracted from, so that the gradient's scale does not depend on
    G.  A response without others gets 0.
    """

    def __call__(self, rewards: Tensor) -> Tensor:
        size = rewards.shape[-1]
        return (rewards - rewards.mean(-1, keepdim=True)) * (size / max(size - 1, 1))


def has_spread(rewards: Tensor) -> Tensor:
    """``[P]`` bool: whether a group's rewards differ, so that it carries a gradient at all."""
    return rewards.amax(-1) > rewards.amin(-1)
