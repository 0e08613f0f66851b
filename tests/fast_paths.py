"""What is there for speed alone, and the slow ways that give the same numbers: ``pytest --without-fast-paths`` takes these.

Fused attention is not among them: without it models are eager, which the oracles of many tests are.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from cppo_lightning import logprobs, module, policy
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.engines import fast_decoding
from cppo_lightning.engines.transformers_engine import TransformersEngine
from cppo_lightning.logprobs import Head, TokenLogProbs
from cppo_lightning.sequences import MicroBatch, Sequences, Work
from tests.test_logprobs import reference_log_softmax

# by a part of an operator's name
_OPERATORS = {"oneDNN": "mkldnn", "fused AdamW": "fused_adamw"}
ALL = frozenset({*_OPERATORS, "slices of the vocabulary", "shared prompts", "cache in place", "grouped attention"})
HERE = ALL if platform.machine() in ("x86_64", "AMD64") else ALL - {"oneDNN"}

# the correctness tests that a run without fast paths repeats: each goes through at least one of them otherwise
REPEATED = frozenset(
    f"test_{name}.py"
    for name in (
        *("fast_paths", "logprobs", "policy", "sequences", "transformers_engine"),
        *("fit", "invariance", "freshness"),
    )
)
# its processes are not those of tests/rank_rig.py, which are told
LEFT_OUT = frozenset({"test_a_stale_engine_of_one_rank_stops_all"})


def repeats(item: pytest.Item) -> bool:
    """Whether a run without fast paths has this test."""
    left_out = item.name in LEFT_OUT or any(item.get_closest_marker(mark) for mark in ("vllm", "soak"))
    return item.path.name in REPEATED and not left_out


def turn_off(patch: pytest.MonkeyPatch) -> None:
    """Of this process, until ``patch`` is undone."""
    patch.setattr(torch.backends.mkldnn, "enabled", False)
    patch.setattr(torch.optim.AdamW, "__init__", _plain(torch.optim.AdamW.__init__))
    patch.setattr(policy, "token_logprobs", _whole_table)
    patch.setattr(module, "micro_batches", _as_sampled)
    patch.setattr(fast_decoding, "speed_up", lambda model: None)
    patch.setattr(fast_decoding, "growing_cache", _copied_cache)


def are_off() -> bool:
    """Whether :func:`turn_off` has been here."""
    return policy.token_logprobs is _whole_table


@contextmanager
def taken() -> Iterator[set[str]]:
    """The names of those that the block takes, when it is over."""
    found: set[str] = set()

    def noting(owner: type, method: str, name: str, is_taken: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if is_taken(*args):
                found.add(name)
            return original(*args, **kwargs)

        patch.setattr(owner, method, noted)

    with pytest.MonkeyPatch.context() as patch, _Operators() as operators:
        noting(policy.Policy, "forward", "shared prompts", _shares)
        noting(logprobs._RunningSoftmax, "add", "slices of the vocabulary")
        noting(fast_decoding.GrowingLayer, "update", "cache in place")
        noting(TransformersEngine, "generate", "grouped attention", _attends_in_groups)
        yield found
    found.update(name for name, part in _OPERATORS.items() if any(part in called for called in operators.names))


class _Operators(TorchDispatchMode):
    """Notes which are called; a profile would take five times as long as the run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _shares(model: policy.Policy, batch: RolloutBatch, temperature: float, read: Sequences | None = None) -> bool:
    return read is not None and read.branches > 1


def _attends_in_groups(engine: TransformersEngine, *args: Any) -> bool:
    return engine._loaded().config._attn_implementation == fast_decoding.GROUPED_ATTENTION


def _plain(init: Callable[..., None]) -> Callable[..., None]:
    """AdamW tensor by tensor, whatever is asked for."""

    @functools.wraps(init)
    def plain(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "fused": False, "foreach": False})

    return plain


def _whole_table(hidden: Tensor, head: Head, ids: Tensor, topk_ids: Tensor | None = None) -> TokenLogProbs:
    """In float64, with the gradients of autograd."""
    full = reference_log_softmax(hidden, head)
    return TokenLogProbs(
        logp=full.gather(-1, ids[:, None])[:, 0].float(),
        entropy=torch.special.entr(full.detach().exp()).sum(-1).float(),
        topk_logp=None if topk_ids is None else full.detach().gather(-1, topk_ids).float(),
    )


def _as_sampled(batch: RolloutBatch, max_tokens: int, work: Work | None = None) -> list[MicroBatch]:
    """Rows in their order, each behind a prompt of its own, as wide as the minibatch is."""
    width = batch.prompt_ids.shape[1] + batch.response_ids.shape[1]
    found = []
    for rows in torch.arange(len(batch)).split(max(1, max_tokens // max(1, width))):
        values = {f.name: value[rows] for f in fields(batch) if (value := getattr(batch, f.name)) is not None}
        part = replace(batch, **values)
        found.append(MicroBatch(part, Sequences.of(part)))
    return found if len(batch) else []


def _copied_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)
