"""One response of vLLM, from the arrays that its engine core returns at each step to tensors.  Imports no vllm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cppo_lightning.engines.engine import Completion
from cppo_lightning.errors import RolloutError

if TYPE_CHECKING:
    from collections.abc import Sequence


class CapturedResponse:
    """A response in the making.

    vLLM's own ``LLM.generate`` makes a Python object of every token id and log-probability, of each rank; here a step's stay
    in the array that they came in.

    Args:
        place: where the response goes in the result of ``generate``.
        top_logprobs: K, the number of most likely tokens asked for.
    """

    def __init__(self, place: int, top_logprobs: int) -> None:
        self.place = place
        self._width = 1 + top_logprobs
        self._ids: list[int] = []
        self._tokens: list[np.ndarray] = []  # per step the sampled token, then the most likely ones
        self._logp: list[np.ndarray] = []

    def add(self, ids: Sequence[int], logprobs: tuple[np.ndarray, np.ndarray, *tuple[Any, ...]] | None) -> None:
        """Append what one step drew; ``logprobs`` begins with tokens and their log-probabilities, ``[new, 1 + K or more]``."""
        self._ids.extend(ids)
        if logprobs is not None:
            self._tokens.append(logprobs[0])
            self._logp.append(logprobs[1])

    def completion(self, reason: str) -> Completion:
        """The whole response, which ended for ``reason`` (vLLM's ``finish_reason``).

        With fewer log-probabilities than tokens it is returned as it is, for ``Completion.check`` to refuse.

        Raises:
            RolloutError: it was cut off by anything but its length limit, or has no log-probabilities or those of other tokens.
        """
        if reason not in ("stop", "length"):
            raise RolloutError(f"vLLM ended sample {self.place} by {reason!r}, not at an end token or its length limit")
        if not self._logp:
            raise RolloutError(f"vLLM returned no log-probabilities for sample {self.place}")
        ids = torch.tensor(self._ids)
        tokens = torch.from_numpy(np.concatenate(self._tokens)[:, : self._width]).long()
        logp = torch.from_numpy(np.concatenate(self._logp)[:, : self._width]).float()
        if not torch.equal(tokens[:, 0], ids[: len(tokens)]):
            raise RolloutError(f"vLLM's log-probabilities of sample {self.place} belong to other tokens than it returned")
        finished = reason == "stop"
        if self._width == 1:
            return Completion(ids, logp[:, 0], finished)
        return Completion(ids, logp[:, 0].clone(), finished, tokens[:, 1:].clone(), logp[:, 1:].clone())
