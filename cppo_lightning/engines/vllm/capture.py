"""One response of vLLM, from the arrays that its engine core returns at each step to tensors.  Imports no vllm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cppo_lightning.engines.engine import Completion
from cppo_lightning.errors import RolloutError

if TYPE_CHECKING:
    from collections.abc import Sequence


class LogProbs:
    """A response's log-probabilities, gathered step by step: of each token the sampled one, then the most likely ones.

    vLLM makes a Python object of every token id and log-probability, of each rank.  Here they are copied from the step's
    arrays, which are views: each that is kept would keep alive those of all the responses in its step.

    Args:
        top_logprobs: K, the number of most likely tokens asked for.
    """

    def __init__(self, top_logprobs: int) -> None:
        self._width = 1 + top_logprobs
        self._tokens = bytearray()
        self._logp = bytearray()

    def add(self, tokens: np.ndarray, logp: np.ndarray) -> None:
        """Append what one step drew, ``[new, 1 + K]`` each, or wider if another response of the step asked for more."""
        self._tokens += tokens[:, : self._width].astype(np.int32, copy=False).tobytes()
        self._logp += logp[:, : self._width].astype(np.float32, copy=False).tobytes()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 and log-probabilities float32, ``[t, 1 + K]`` each; nothing can be added any more."""
        buffers = (np.frombuffer(self._tokens, np.int32), np.frombuffer(self._logp, np.float32))
        return buffers[0].reshape(-1, self._width), buffers[1].reshape(-1, self._width)


class CapturedResponse:
    """A response in the making, within the trainer's process.

    Args:
        place: where the response goes in the result of ``generate``.
        top_logprobs: K, the number of most likely tokens asked for.
    """

    def __init__(self, place: int, top_logprobs: int) -> None:
        self.place = place
        self._ids: list[int] = []
        self._logprobs = LogProbs(top_logprobs)

    def add(self, ids: Sequence[int], logprobs: tuple[np.ndarray, np.ndarray, *tuple[Any, ...]] | None) -> None:
        """Append what one step drew; ``logprobs`` begins with tokens and their log-probabilities, ``[new, 1 + K or more]``."""
        self._ids.extend(ids)
        if logprobs is not None:
            self._logprobs.add(logprobs[0], logprobs[1])

    def completion(self, reason: str) -> Completion:
        """:func:`completion_of` all that was added."""
        return completion_of(self.place, np.array(self._ids, np.int64), *self._logprobs.arrays(), reason)


def completion_of(place: int, ids: np.ndarray, tokens: np.ndarray, logp: np.ndarray, reason: str) -> Completion:
    """The whole response ``ids`` ``[t]`` at ``place``, which ended for ``reason`` (vLLM's ``finish_reason``).

    With fewer log-probabilities than tokens it is returned as it is, for ``Completion.check`` to refuse.

    Args:
        tokens: the sampled token, then the most likely ones, ``[t, 1 + K]``.
        logp: their log-probabilities, ``[t, 1 + K]`` float32.

    Raises:
        RolloutError: it was cut off by anything but its length limit, or has no log-probabilities or those of other tokens.
    """
    if reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended sample {place} by {reason!r}, not at an end token or its length limit")
    if not len(logp):
        raise RolloutError(f"vLLM returned no log-probabilities for sample {place}")
    if not np.array_equal(tokens[:, 0], ids[: len(tokens)]):
        raise RolloutError(f"vLLM's log-probabilities of sample {place} belong to other tokens than it returned")
    # copies, so that a response that is kept does not bring along those that it came with
    sampled = Completion(torch.tensor(ids, dtype=torch.int64), torch.tensor(logp[:, 0]), finished=reason == "stop")
    if tokens.shape[1] > 1:
        sampled.topk_ids, sampled.topk_logp = torch.tensor(tokens[:, 1:], dtype=torch.int64), torch.tensor(logp[:, 1:])
    return sampled
