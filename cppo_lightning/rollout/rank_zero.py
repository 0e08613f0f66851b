"""What rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from cppo_lightning.errors import RolloutError

T = TypeVar("T")


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_rank_zero(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, on every rank, each of which must call this; the others wait for it.

    Raises:
        RolloutError: on the other ranks, in place of what ``make`` raised on rank 0.
    """
    if not torch.distributed.is_initialized():
        return make()
    box: list[Any] = [None, None]  # the result; what went wrong
    failure: Exception | None = None
    if is_rank_zero():
        try:
            box[0] = make()
        except Exception as error:  # raised below, once the others know
            box[1], failure = f"rank 0: {error}", error
    torch.distributed.broadcast_object_list(box)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise RolloutError(box[1])
    return box[0]
