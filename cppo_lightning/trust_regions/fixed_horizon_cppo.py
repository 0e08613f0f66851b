"""CPPO with the position weight of one public implementation, which spreads it over the padded width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.cppo import CPPO, positions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FixedHorizonCPPO(CPPO):
    """:class:`CPPO` whose weight falls to ``w_min`` over a constant horizon H, not over the response's own length::

        w_t = 1 - (1 - w_min) (t - 1) / (H - 1),  w_t = w_min for t > H

    That is what comes of taking the width of the padded batch for T (arXiv 2606.10968, Eq. 9, has the response's length): with
    responses padded to the longest one allowed, most of them end before the weight has moved much.

    Args:
        horizon: H in trainable tokens, at least 2; the longest response allowed, 8192 in most of the paper's runs.

    Raises:
        ConfigError: a value outside its range.
    """

    horizon: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < 2:
            raise ConfigError(f"FixedHorizonCPPO.horizon must be at least 2 tokens (usual: max_tokens), got {self.horizon}")

    def position_weight(self, mask: Tensor, position: Tensor | None = None) -> Tensor:
        """w_t ``[B, T]`` float32, 0 where masked: from 1 at the first trainable token to ``w_min`` at the H-th and after."""
        position = positions(mask) if position is None else position
        share = position.clamp(max=self.horizon - 1).float() / (self.horizon - 1)
        return (1 - (1 - self.w_min) * share).masked_fill_(~mask, 0.0)
