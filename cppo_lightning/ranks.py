"""Work that ranks share: what one does for all, and failures that all see, since a rank that fails alone leaves the others
waiting for it in their next collective."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cppo_lightning.errors import RolloutError
from cppo_lightning.interrupts import INTERRUPTS, Interrupted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

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


def sampling_share(trainer: Trainer) -> tuple[int, int]:
    """This rank's number among those that sample problems of their own, and how many these are: all, each with its engine."""
    return trainer.global_rank, trainer.world_size


def data_share(trainer: Trainer) -> tuple[int, int]:
    """This rank's number among those that train on batches of their own, and how many these are.

    Ranks that hold parts of one layer train on the same batch, and the strategy knows which do.
    """
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
    return share["rank"], share["num_replicas"]


def data_sum(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum of ``values`` over ranks, in which each batch counts once; every rank must call this.

    Args:
        values: the same on all ranks that train on the same batch.
    """
    mesh = getattr(trainer.strategy, "device_mesh", None)
    group = None if mesh is None else mesh["data_parallel"].get_group()
    return trainer.strategy.reduce(values, group=group, reduce_op="sum")


def with_same_batch(trainer: Trainer, mine: T) -> list[T]:
    """What each rank that trains on this one's batch brings, in the same order on all of them; each must call this."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is None or mesh["tensor_parallel"].size() == 1:
        return [mine]
    found: list[Any] = [None] * mesh["tensor_parallel"].size()
    torch.distributed.all_gather_object(found, mine, mesh["tensor_parallel"].get_group())
    return found


def leads_batch(trainer: Trainer) -> bool:
    """Whether this rank is the first of those that train on its batch: it writes what is to be there once."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return mesh is None or mesh["tensor_parallel"].get_local_rank() == 0


class AllRanksError(RolloutError):
    """A failure of some rank that every rank raises, at the same place."""


class AllRanksInterrupted(Interrupted):
    """A signal that some rank received, which every rank raises, at the same place."""


def on_all_ranks(make: Callable[[], T]) -> T:
    """What ``make`` returns on this rank, once it has returned on all; every rank must call this.

    Without other ranks, signals end ``make`` at once.  With others they do so where ``make`` says ``INTERRUPTS.at_once``, since
    it may be in the middle of a collective elsewhere.

    Raises:
        AllRanksError: on every rank, with all messages, if ``make`` raises on any.  A process without others raises its own.
        AllRanksInterrupted: on every rank, if a signal ended ``make`` on any.
    """
    if not torch.distributed.is_initialized():
        with INTERRUPTS.at_once():
            return make()
    rank, failure = torch.distributed.get_rank(), None
    try:
        made = [make()]
    except (Exception, Interrupted) as error:  # raised below, once the others know
        made, failure = [], error
    mine = failure.received if isinstance(failure, Interrupted) else None if failure is None else f"rank {rank}: {failure}"
    found = on_every_rank(mine)
    for received in found:
        if isinstance(received, signal.Signals):
            raise AllRanksInterrupted(received) from failure
    if messages := [message for message in found if isinstance(message, str)]:
        raise AllRanksError("; ".join(messages)) from failure
    return made[0]


@contextmanager
def gone_through(items: Iterator[Any]) -> Iterator[None]:
    """Whatever ends the block, the rest of ``items`` is gone through: making one may be a collective, which others wait in."""
    try:
        yield
    finally:
        for _ in items:
            pass


def check_signals(device: torch.device) -> None:
    """Raise on every rank if any has received a signal; every rank must call this, where nothing is half done.

    Args:
        device: where the process group reduces tensors.

    Raises:
        Interrupted: this process, without others, has received one.
        AllRanksInterrupted: some rank has.
    """
    if not torch.distributed.is_initialized():
        INTERRUPTS.check()
        return
    received = torch.tensor(INTERRUPTS.received or 0, device=device)
    torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
    if int(received):
        raise AllRanksInterrupted(signal.Signals(int(received)))


def on_every_rank(value: T) -> list[T]:
    """Every rank's ``value`` by rank.  Every rank must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def on_rank_zero(value: T) -> list[T] | None:
    """Every rank's ``value`` by rank, on rank 0 alone; None elsewhere.  Every rank must call this."""
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] | None = [None] * torch.distributed.get_world_size() if is_rank_zero() else None
    torch.distributed.gather_object(value, found)
    return found
