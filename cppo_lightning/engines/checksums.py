"""Checksums of weights, by which trainer and engine find out whether they hold the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 2**16  # words that are summed at once: their products fit into a core's cache
_GOLDEN = 0x9E3779B97F4A7C15  # odd


def checksum(tensor: Tensor) -> int:
    """64 bits that depend on each bit of ``tensor`` and on its place, and not on device, strides or shape.

    Memory is read as 32-bit words; each is multiplied by an odd 64-bit constant of its place, and the products are added modulo
    2^64.  One changed word always shows, any other change all but certainly; with words of 64 bits two changed signs would not.

    Returns:
        0 to 2^64 - 1.  It waits for the device once.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    per_word = 4 // flat.element_size()
    if len(flat) % per_word or flat.storage_offset() % per_word:
        flat = pad(flat, (0, -len(flat) % per_word)).clone()  # an own memory, which begins and ends with a word
    factors = _factors(flat.device)
    sums = [block.long().mul_(factors[: len(block)]).sum() for block in flat.view(torch.int32).split(_BLOCK)]
    total = tensor.numel()
    for value in torch.stack(sums).tolist():
        total = (total * _GOLDEN + value) % 2**64  # by which blocks have places too
    return total


def checksums(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, int]:
    """Checksum by name of each tensor after a cast to ``dtype``, one at a time."""
    return {name: checksum(tensor.to(dtype)) for name, tensor in weights}


@lru_cache(maxsize=2)
def _factors(device: torch.device) -> Tensor:
    """Odd int64 constants ``[_BLOCK]``; numpy promises the same stream of this generator on every machine and version."""
    words = np.random.PCG64(0).random_raw(_BLOCK) | np.uint64(1)
    return torch.from_numpy(words.view(np.int64)).to(device)
