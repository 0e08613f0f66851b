"""Ranks that fail together: one that fails alone leaves the others waiting for it in their next collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from cppo_lightning.errors import RolloutError

T = TypeVar("T")


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
