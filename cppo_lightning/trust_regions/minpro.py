"""MinPRO: minimum prefix ratio (arXiv 2601.22718)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import pad

from cppo_lightning.trust_regions.cispo import CISPO

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class MinPRO(CISPO):
    """CISPO's objective with the weight ``clip(min(rho_1 .. rho_{t-1}) rho_t, min_weight, max_weight)``.

    The smallest ratio of the strictly earlier tokens stands in for the product of them all.  The first token's prefix is
    empty and counts as 1; otherwise the minimum is the formula's, so it may lie above 1.

    Args:
        min_weight: least weight; 0 for none, since a floor undoes what a small prefix ratio does.
        max_weight: largest weight, the cap itself.  The paper's limits could not be read; these are CISPO's.

    Raises:
        ConfigError: not ``0 <= min_weight <= 1 <= max_weight``.
    """

    @property
    def recomputable(self) -> bool:
        return False  # a prefix's ratios stand for how far the response is from where it was sampled, which is mu

    def importance(self, stats: TokenStats) -> Tensor:
        """The weight before it is clipped, ``[B, T]``."""
        ratio = stats.ratio
        prefix = pad(ratio.masked_fill(~stats.mask, math.inf).cummin(-1).values[:, :-1], (1, 0), value=math.inf)
        return ratio * prefix.masked_fill(prefix.isinf(), 1.0)
