"""Per-token divergences between the rollout policy mu and the current policy pi, from detached log-probabilities.

All give ``[B, T]`` float32, finite and at least 0, exactly 0 where pi = mu and where masked.  Direction is mu against pi.
``Binary...`` and ``TopK...`` sum the next-token distributions up in a few bins and so lower-bound the divergence of the whole
distributions, which K = V gives; ``Sampled...`` are noisy estimates of KL from the sampled token alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats

_TINY = 1e-12  # least probability of a bin in a KL, under mu and under pi alike
_RESOLUTION = 2.0**-23  # of 1 - (sum of probabilities) in float32: a difference below it is rounding, not divergence


class Divergence(ABC):
    """D_t = D(mu(.|s_t), pi(.|s_t)), estimated from what :class:`TokenStats` carries."""

    unit: ClassVar[str] = "divergence"

    @property
    def title(self) -> str:
        """What it is called in pictures."""
        return type(self).__name__

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

    unit: ClassVar[str] = "probability"

    @property
    def title(self) -> str:
        return "|π \N{MINUS SIGN} µ| of the sampled token"

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.logp.exp() - stats.rollout_logp.exp()).abs().masked_fill(~stats.mask, 0.0)


@dataclass(frozen=True)
class BinaryKL(Divergence):
    """KL(mu || pi) in nats of "the sampled token or any other" (DPPO Eq. 14)."""

    unit: ClassVar[str] = "nats"

    @property
    def title(self) -> str:
        return "binary KL(µ‖π)"

    def __call__(self, stats: TokenStats) -> Tensor:
        sampled = _kl(stats.rollout_logp.exp(), stats.logp.exp(), _TINY)
        others = _kl(-stats.rollout_logp.expm1(), -stats.logp.expm1(), _RESOLUTION)
        return (sampled + others).masked_fill(~stats.mask, 0.0)


class _Bins(NamedTuple):
    """Probabilities of the reduced bins under one policy; ``other`` may be below 0 by rounding."""

    top: Tensor  # [B, T, K] the K most likely tokens of mu
    own: Tensor  # [B, T] the sampled token if it is not among them, else 0
    other: Tensor  # [B, T] all other tokens together


@dataclass(frozen=True)
class _TopK(Divergence):
    """Bins: the K most likely tokens of mu, the sampled token if it is not among them, and one bin for all others."""

    k: int = 20

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(
                f"{type(self).__name__}.k must be at least 1, got {self.k}; "
                "for the sampled token alone use BinaryTV or BinaryKL"
            )

    @property
    def top_k(self) -> int:
        return self.k

    def bins(self, stats: TokenStats) -> tuple[_Bins, _Bins]:
        """Of mu and of pi."""
        ids, mu_logp, pi_logp = stats.topk_ids, stats.topk_rollout_logp, stats.topk_logp
        if ids is None or mu_logp is None or pi_logp is None or ids.shape[-1] < self.k:
            have = 0 if ids is None or mu_logp is None or pi_logp is None else ids.shape[-1]
            raise ValueError(f"{self} needs {self.k} top-K entries per token, the batch carries {have}")
        outside = (ids[..., : self.k] != stats.response_ids[..., None]).all(-1)

        def of(top_logp: Tensor, logp: Tensor) -> _Bins:
            top, own = top_logp[..., : self.k].exp(), logp.exp() * outside
            return _Bins(top, own, 1 - top.sum(-1) - own)

        return of(mu_logp, stats.rollout_logp), of(pi_logp, stats.logp)


@dataclass(frozen=True)
class TopKTV(_TopK):
    """Top-K reduced total variation (DPPO Eq. 15; CPPO, arXiv 2606.10968, Sec. 4.1).

    Args:
        k: how many of mu's most likely tokens get a bin of their own.

    Raises:
        ConfigError: ``k < 1``.
        ValueError: on call, the batch carries fewer than k top-K entries.
    """

    unit: ClassVar[str] = "probability"

    @property
    def title(self) -> str:
        return f"top-{self.k} total variation"

    def __call__(self, stats: TokenStats) -> Tensor:
        mu, pi = self.bins(stats)
        other = (mu.other.clamp(min=0) - pi.other.clamp(min=0)).abs()
        total = (mu.top - pi.top).abs().sum(-1) + (mu.own - pi.own).abs() + other
        return (0.5 * total).masked_fill(~stats.mask, 0.0)


@dataclass(frozen=True)
class TopKKL(_TopK):
    """Top-K reduced KL(mu || pi) in nats (DPPO Eq. 16), on the bins of :class:`TopKTV`.

    Args:
        k: how many of mu's most likely tokens get a bin of their own.

    Raises:
        ConfigError: ``k < 1``.
        ValueError: on call, the batch carries fewer than k top-K entries.
    """

    unit: ClassVar[str] = "nats"

    @property
    def title(self) -> str:
        return f"top-{self.k} KL(µ‖π)"

    def __call__(self, stats: TokenStats) -> Tensor:
        mu, pi = self.bins(stats)
        total = _kl(mu.top, pi.top, _TINY).sum(-1) + _kl(mu.own, pi.own, _TINY) + _kl(mu.other, pi.other, _RESOLUTION)
        return total.masked_fill(~stats.mask, 0.0)


@dataclass(frozen=True)
class SampledK2(Divergence):
    """``(log rho_t)^2 / 2``, symmetric in mu and pi: TRM's stand-in for the maximum over tokens (arXiv 2512.23075, App.)."""

    unit: ClassVar[str] = "nats"

    @property
    def title(self) -> str:
        return "(log \N{GREEK SMALL LETTER RHO})² / 2 of the sampled token"

    def __call__(self, stats: TokenStats) -> Tensor:
        return 0.5 * stats.ratio.clamp(_TINY, 1 / _TINY).log().square()


@dataclass(frozen=True)
class SampledK3(Divergence):
    """``rho_t - 1 - log rho_t``, whose mean under mu is KL(mu || pi): TRM's stand-in for the mean (arXiv 2512.23075, App.)."""

    unit: ClassVar[str] = "nats"

    @property
    def title(self) -> str:
        return "k3 estimate of KL(µ‖π)"

    def __call__(self, stats: TokenStats) -> Tensor:
        return _excess(stats.ratio)


def captured_mass(stats: TokenStats, k: int | None = None) -> Tensor:
    """Probability under mu of its k most likely tokens (None: of all that the batch carries), ``[B, T]``, 0 where masked.

    What is left of 1 is the part of the distribution that a Top-K divergence sees as one bin.

    Raises:
        ValueError: the batch carries no top-K entries.
    """
    if stats.topk_rollout_logp is None:
        raise ValueError("captured_mass needs top-K entries, the batch carries none")
    return stats.topk_rollout_logp[..., :k].exp().sum(-1).masked_fill(~stats.mask, 0.0)


def _kl(mu: Tensor, pi: Tensor, least: float) -> Tensor:
    """A bin's part of KL(mu || pi), written as ``mu log(mu / pi) - mu + pi`` with both probabilities at least ``least``.

    Since both policies' bins sum to 1 the added terms sum to 0; each part is then at least 0, and small ones are not lost
    to rounding as they are in a difference of logarithms.
    """
    mu = mu.clamp(min=least)
    return mu * _excess(pi.clamp(min=least) / mu)


def _excess(ratio: Tensor) -> Tensor:
    """``r - 1 - log r``, 0 at r = 1 and above 0 elsewhere."""
    ratio = ratio.clamp(_TINY, 1 / _TINY)
    return (ratio - 1 - ratio.log()).clamp(min=0)
