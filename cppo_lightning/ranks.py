"""Work that ranks share: what one does for all, and failures that all see, since a rank that fails alone leaves the others
waiting for it in their next collective."""

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


class AllRanksError(RolloutError):
    """A failure of some rank that every rank raises, at the same place."""


def on_all_ranks(make: Callable[[], T]) -> T:
    """What ``make`` returns on this rank, once it has returned on all; every rank must call this.

    Raises:
        AllRanksError: on every rank, with all messages, if ``make`` raises on any.  A process without others raises its own.
    """
    if not torch.distributed.is_initialized():
        return make()
    rank, failure = torch.distributed.get_rank(), None
    try:
        made = [make()]
    except Exception as error:  # raised below, once the others know
        made, failure = [], error
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if failure is None else f"rank {rank}: {failure}")
    if messages := [message for message in found if message is not None]:
        raise AllRanksError("; ".join(messages)) from failure
    return made[0]
