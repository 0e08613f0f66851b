"""Ranks of a process group on one machine's CPU: processes forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(["tests.rank_rig_imports"])


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, deadline: float = 600) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``count`` ranks, which look as if torchrun had started them.

    Raises:
        AssertionError: with the traceback of a rank that failed, or when ranks take longer than ``deadline`` seconds.
    """
    # here and not above, which each rank would import too
    from tests.fast_paths import are_off

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_RANKS.Pipe(duplex=False) for _ in range(count)]
    ranks = [
        _RANKS.Process(target=_rank, args=(rank, count, port, are_off(), sender, function, arguments), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    try:
        return [_result(rank, receiver, deadline) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for rank in ranks:
            rank.join(5)
            rank.kill()


def _result(rank: int, receiver: Any, deadline: float) -> Any:
    assert receiver.poll(deadline), f"rank {rank} has not ended after {deadline} s"
    failure, result = pickle.loads(receiver.recv_bytes())
    assert failure is None, f"rank {rank}:\n{failure}"
    return result


def _rank(
    rank: int, count: int, port: int, plain: bool, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    if plain:
        import pytest

        from tests.fast_paths import turn_off

        turn_off(pytest.MonkeyPatch())
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    try:
        ended = (None, function(*arguments))
    except BaseException:
        ended = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(ended))  # send would have tensors fetched from this process, which ends
