"""Requests to /inference/v1/generate and what comes back: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.engines.vllm.capture import CapturedResponse
from cppo_lightning.errors import RolloutError

_LEAST = -9999.0  # what the server writes for -inf and NaN, which JSON has not


def request_body(
    prompt: Sequence[int], number: int, n: int, sampling: Sampling, top_logprobs: int, seed: int, eos: list[int]
) -> dict[str, Any]:
    """The request for the ``n`` samples of prompt ``number``, whose draws depend on ``seed`` and that number alone."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return {
        "token_ids": list(prompt),
        "sampling_params": {
            "n": n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_token_ids": eos,
            # one more than wanted: of the sampled token and the K most likely ones the server returns K alone
            "logprobs": top_logprobs + 1 if top_logprobs else 0,
            "seed": int.from_bytes(digest, "big") >> 2,  # vLLM adds the sample's number, and takes an int64
            "detokenize": False,
        },
    }


def completions_of(choices: list[dict[str, Any]], first: int, n: int, top_logprobs: int) -> Iterator[tuple[int, Completion]]:
    """Place and completion of each of a prompt's ``n`` samples, whose places begin at ``first``.

    Raises:
        RolloutError: other samples than asked for, or one that was cut off, has no log-probabilities or those of other tokens.
    """
    if sorted(choice["index"] for choice in choices) != list(range(n)):
        raise RolloutError(f"vLLM returned samples {[choice['index'] for choice in choices]} of a prompt, not 0 to {n - 1}")
    for choice in choices:
        place = first + choice["index"]
        response = CapturedResponse(place, top_logprobs)
        response.add(choice["token_ids"], _logprobs(choice, place, top_logprobs))
        yield place, response.completion(choice["finish_reason"])


def _logprobs(choice: dict[str, Any], place: int, top_logprobs: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and their log-probabilities ``[t, 1 + K]``: the sampled one, then the most likely ones in order."""
    steps = (choice["logprobs"] or {}).get("content")
    if not steps:
        return None
    ids = np.array([[step["token_id"]] for step in steps])
    logp = np.array([[step["logprob"]] for step in steps], dtype=np.float32)
    if top_logprobs:
        tops = [step["top_logprobs"] for step in steps]
        if any(len(top) < top_logprobs for top in tops) or len({len(top) for top in tops}) > 1:
            raise RolloutError(f"vLLM returned fewer than {top_logprobs} top log-probabilities for a token of sample {place}")
        top_ids = np.array([[entry["token_id"] for entry in top] for top in tops])
        top_logp = np.array([[entry["logprob"] for entry in top] for top in tops], dtype=np.float32)
        best = np.argsort(-top_logp, axis=-1, kind="stable")[:, :top_logprobs]
        ids = np.concatenate([ids, np.take_along_axis(top_ids, best, -1)], axis=-1)
        logp = np.concatenate([logp, np.take_along_axis(top_logp, best, -1)], axis=-1)
    logp[logp == _LEAST] = -np.inf
    return ids, logp
