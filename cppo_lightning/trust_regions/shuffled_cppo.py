"""CPPO with its position weights at random positions: does it matter that early tokens are held more strictly?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cppo_lightning.trust_regions.cppo import CPPO, positions

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats


@dataclass(frozen=True)
class ShuffledCPPO(CPPO):
    """:class:`CPPO` with each response's w_1..w_T permuted among its tokens (an ablation of arXiv 2606.10968).

    The permutation is a function of ``seed`` and of the response's own token ids, so it is the same at each of a rollout's
    updates, on any rank, in any micro-batch and under any padding.  Responses that are equal word for word share it.

    Args:
        seed: another seed, another permutation.
    """

    seed: int = 0

    def token_weight(self, stats: TokenStats) -> Tensor:
        """The w_t that each token gets ``[B, T]`` float32, 0 where masked: a permutation of :meth:`position_weight`."""
        return self.position_weight(stats.mask, self.shuffled_positions(stats))

    def shuffled_positions(self, stats: TokenStats) -> Tensor:
        """``[B, T]`` int64: 0..n-1 in random order over a response's n trainable tokens, n and above where masked."""
        mask = stats.mask
        position = positions(mask).long()
        # the sum wraps around and has no order, so padding and masked tokens, which add 0, change nothing
        tokens = _mix(stats.response_ids.masked_fill(~mask, 0) + (position << 32)).masked_fill_(~mask, 0)
        response = _mix(tokens.sum(-1, keepdim=True) + _mix(mask.new_full((1, 1), self.seed, dtype=torch.int64)))
        # rows one after another in a single sort: of one dimension torch sorts integers in linear time, of two it does not
        row = torch.arange(len(mask), device=mask.device)[:, None]
        key = ((_mix(response + position) >> 33) & ((1 << 31) - 1)).masked_fill_(~mask, 1 << 31) + (row << 32)
        order = key.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=mask.device))
        return place.view_as(mask) - row * mask.shape[-1]


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) on int64: every bit of the input moves every bit."""
    # torch shifts signed numbers arithmetically: the mask takes away the copies of the sign; products wrap around
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (1 << 33) - 1)
