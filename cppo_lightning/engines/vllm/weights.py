"""The trainer's weights on their way into an engine: each in the engine's dtype, with its checksum, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cppo_lightning.engines.checksums import checksum

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def received(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, checksums: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Pass ``weights`` on as ``dtype``, and write each one's checksum into ``checksums``."""
    for name, tensor in weights:
        cast = tensor.to(dtype)
        del tensor  # two whole parameters would be held otherwise, this one while the next is gathered
        checksums[name] = checksum(cast)
        yield name, cast
        del cast
