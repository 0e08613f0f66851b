"""What trainer and servers send each other to sample: token ids in, token ids and log-probabilities out.  Imports no vllm."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.engines.vllm.capture import LogProbs, completion_of
from cppo_lightning.engines.vllm.settings import sampling_params
from cppo_lightning.errors import RolloutError

PATH = "/cppo/generate"


def request_body(
    prompt: Sequence[int], number: int, n: int, sampling: Sampling, top_logprobs: int, seed: int, eos: list[int]
) -> dict[str, Any]:
    """The request for the ``n`` samples of prompt ``number``, whose draws depend on ``seed`` and that number alone."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return {
        "token_ids": list(prompt),
        "sampling_params": {
            "n": n,
            **sampling_params(sampling, top_logprobs, eos),
            "seed": int.from_bytes(digest, "big") >> 2,  # vLLM adds the sample's number, and takes an int64
            "detokenize": False,
        },
    }


@dataclass(frozen=True)
class Answer:
    """The ``n`` samples of one prompt, whose ``N`` tokens follow each other; travels as numpy's .npz, without pickles.

    Args:
        lengths: ``[n]`` int64, tokens of each sample.
        reasons: ``[n]`` strings, vLLM's ``finish_reason`` of each.
        labels: strings, the names of all weights that a token was drawn with.
        ids: ``[N]`` int32.
        tokens: ``[N, 1 + K]`` int32, the sampled token, then the most likely ones.
        logp: ``[N, 1 + K]`` float32, their log-probabilities.
    """

    lengths: np.ndarray
    reasons: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray
    logp: np.ndarray

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], reasons: Sequence[str], logprobs: Sequence[LogProbs], labels: Sequence[str]
    ) -> Self:
        """From the samples in their order.

        Raises:
            ValueError: a sample has another number of log-probabilities than tokens.
        """
        tokens, logp = zip(*(each.arrays() for each in logprobs), strict=True)
        lengths = [len(each) for each in ids]
        if lengths != [len(each) for each in logp]:
            raise ValueError(f"vLLM drew {lengths} tokens and returned log-probabilities of {[len(each) for each in logp]}")
        flat = np.concatenate([np.array(each, np.int32) for each in ids])
        names = np.array(sorted(set(labels)), dtype=np.str_)
        return cls(np.array(lengths), np.array(reasons, np.str_), names, flat, np.concatenate(tokens), np.concatenate(logp))

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> Self:
        """What the server at ``url`` sent.

        Raises:
            RolloutError: it is no answer.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RolloutError(f"what {url} answered cannot be read: {error}; does it run this cppo_lightning?") from error

    def completions(self, first: int, n: int, top_logprobs: int) -> Iterator[tuple[int, Completion]]:
        """Place and completion of each sample; their places begin at ``first``.

        Raises:
            RolloutError: other samples or another K than asked for, or what :func:`completion_of` refuses.
        """
        if len(self.lengths) != n:
            raise RolloutError(f"vLLM returned {len(self.lengths)} samples of a prompt, not {n}")
        if self.logp.shape[1] != 1 + top_logprobs:
            raise RolloutError(f"vLLM returned {self.logp.shape[1] - 1} top log-probabilities per token, not {top_logprobs}")
        ends = self.lengths.cumsum()
        parts = [np.split(array, ends[:-1]) for array in (self.ids, self.tokens, self.logp)]
        for place, (ids, tokens, logp, reason) in enumerate(zip(*parts, self.reasons, strict=True), first):
            yield place, completion_of(place, ids, tokens, logp, str(reason))
