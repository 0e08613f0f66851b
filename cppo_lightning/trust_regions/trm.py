"""TRM: trust-region masking of whole responses (arXiv 2512.23075)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cppo_lightning.batch import Gate
from cppo_lightning.divergences import Divergence, TopKKL, captured_mass
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats

PAPER_DELTA = {"max": 0.05, "mean": 0.001}


@dataclass(frozen=True)
class TRM(TrustRegion):
    """Keeps a response whole if the largest (TRM-Max) or the mean (TRM-Avg) D_t of its trainable tokens is at most delta.

    Neither the advantage's sign nor the direction of the update matters.  Rejected responses stay in the loss's denominator.

    Args:
        reduce: ``max`` or ``mean``.
        delta: threshold in nats; None for the paper's, 0.05 with ``max`` and 0.001 with ``mean``.
        divergence: D_t.  The paper has KL over the whole vocabulary, which ``TopKKL`` bounds from below and k = V gives; its
            estimates from sampled tokens are ``SampledK2`` (for ``max``) and ``SampledK3`` (for ``mean``).

    Raises:
        ConfigError: unknown ``reduce``, or a threshold that is not above 0.
    """

    reduce: Literal["max", "mean"] = "max"
    delta: float | None = None
    divergence: Divergence = TopKKL()

    def __post_init__(self) -> None:
        if self.reduce not in PAPER_DELTA:
            raise ConfigError(f"TRM.reduce must be max or mean, got {self.reduce!r}")
        if self.delta is not None and not self.delta > 0:
            raise ConfigError(f"TRM.delta must be above 0 (usual: 0.05 with max, 0.001 with mean), got {self.delta}")

    @property
    def top_k(self) -> int:
        return self.divergence.top_k

    @property
    def token_threshold(self) -> float | None:
        return self.whole_threshold if self.reduce == "max" else None

    @property
    def whole_threshold(self) -> float:
        """The delta in force, for :meth:`whole`."""
        return PAPER_DELTA[self.reduce] if self.delta is None else self.delta

    def __call__(self, stats: TokenStats) -> Gate:
        ratio, mask = stats.ratio, stats.mask
        divergence = self.divergence(stats)
        rejected = self.whole(divergence, mask) > self.whole_threshold
        keep = mask & ~rejected[:, None]
        diagnostics = {
            "divergence": divergence,
            "toward": stats.toward,
            "rejected": rejected,
        }
        if self.top_k:
            diagnostics["captured_mass"] = captured_mass(stats, self.top_k)
        return Gate(weight=ratio.masked_fill(~keep, 0.0), keep=keep, diagnostics=diagnostics)

    def whole(self, divergence: Tensor, mask: Tensor) -> Tensor:
        """Each response's maximum or mean ``[B]`` of a divergence ``[B, T]`` that is 0 where masked."""
        if self.reduce == "max":
            return divergence.amax(-1)
        # cumsum, since how sum(-1) rounds depends on the padded width
        return divergence.cumsum(-1)[:, -1] / mask.sum(-1).clamp(min=1)
