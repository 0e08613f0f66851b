"""Per-token divergences between the rollout policy mu and the current policy pi, from detached log-probabilities.

All give ``[B, T]`` float32, 0 where masked, and lower-bound the divergence of the full next-token distributions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats


class Divergence(ABC):
    """D_t = D(mu(.|s_t), pi(.|s_t)), estimated from what :class:`TokenStats` carries."""

    @property
    def top_k(self) -> int:
        """Number of top-K entries of mu this divergence reads; 0 when the sampled token suffices."""
        return 0

    @abstractmethod
    def __call__(self, stats: TokenStats) -> Tensor:
        """Return D ``[B, T]`` float32 >= 0, 0 where masked."""


@dataclass(frozen=True)
class BinaryTV(Divergence):
    """Total variation of "the sampled token or any other": ``|pi(y_t) - mu(y_t)|`` (DPPO, arXiv 2602.04879, Eq. 13)."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.logp.exp() - stats.rollout_logp.exp()).abs().masked_fill(~stats.mask, 0.0)


@dataclass(frozen=True)
class TopKTV(Divergence):
    """Top-K reduced total variation (DPPO Eq. 15; CPPO, arXiv 2606.10968, Sec. 4.1).

    Bins: the K most likely tokens of mu, the sampled token if it is not among them, and one bin for all others.

    Args:
        k: how many of mu's most likely tokens get a bin of their own.

    Raises:
        ConfigError: ``k < 1``.
        ValueError: on call, the batch carries fewer than k top-K entries.
    """

    k: int = 20

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"TopKTV.k must be at least 1, got {self.k}; for the sampled token alone use BinaryTV")

    @property
    def top_k(self) -> int:
        return self.k

    def __call__(self, stats: TokenStats) -> Tensor:
        ids, mu_logp, pi_logp = stats.topk_ids, stats.topk_rollout_logp, stats.topk_logp
        if ids is None or mu_logp is None or pi_logp is None or ids.shape[-1] < self.k:
            have = 0 if ids is None or mu_logp is None or pi_logp is None else ids.shape[-1]
            raise ValueError(f"TopKTV(k={self.k}) needs {self.k} top-K entries per token, the batch carries {have}")
        mu, pi = mu_logp[..., : self.k].exp(), pi_logp[..., : self.k].exp()
        own_bin = (ids[..., : self.k] != stats.response_ids[..., None]).all(-1)  # y_t is outside the top-K
        mu_y, pi_y = stats.rollout_logp.exp() * own_bin, stats.logp.exp() * own_bin
        mu_other = (1 - mu.sum(-1) - mu_y).clamp(min=0)
        pi_other = (1 - pi.sum(-1) - pi_y).clamp(min=0)
        total = (mu - pi).abs().sum(-1) + (mu_y - pi_y).abs() + (mu_other - pi_other).abs()
        return (0.5 * total).masked_fill(~stats.mask, 0.0)
