"""The GPU's memory, which engine and trainer use in turn.  Imports no vllm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's names


class Sleeps(Protocol):
    """What is needed of ``vllm.LLM``."""

    def sleep(self, level: int = 1) -> None: ...
    def wake_up(self, tags: list[str] | None = None) -> object: ...


class LentMemory:
    """Has an engine's weights and cache on the GPU while it samples, and nothing of them while the trainer trains.

    Between samplings the weights lie in the CPU's memory and the cache is forgotten (vLLM's sleep level 1).  Level 2 would
    forget the weights too, but one sync may serve several samplings: refills, an evaluation, a check of the weights.

    Args:
        engine: whose memory it is; None for one that keeps it.
    """

    def __init__(self, engine: Sleeps | None) -> None:
        self._engine = engine
        self._away: set[str] = set()

    def bring(self, *parts: str) -> None:
        """Have ``parts`` on the GPU."""
        if self._engine is not None and (wanted := sorted(self._away.intersection(parts))):
            self._engine.wake_up(wanted)
            self._away.difference_update(wanted)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """All of it on the GPU, and afterwards, however the block ends, none."""
        self.bring(WEIGHTS, CACHE)
        try:
            yield
        finally:
            if self._engine is not None:
                self._engine.sleep(level=1)
                self._away = {WEIGHTS, CACHE}
