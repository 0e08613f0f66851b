"""What a recording holds: one row per response that was trained on, in the order that the trust region saw them.

docs/replay.md describes the columns.  Lists of one row belong together token by token; top-K lists have K entries for each
token, one token after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats

BY_TOKEN = {
    "response_ids": pa.int32(),
    "mask": pa.bool_(),
    "rollout_logp": pa.float32(),
    "logp": pa.float32(),
    "weight": pa.float32(),
    "keep": pa.bool_(),
}
TOP_K = {"topk_ids": pa.int32(), "topk_rollout_logp": pa.float32(), "topk_logp": pa.float32()}
OLD = {"old_logp": pa.float32()}
LISTS = {"prompt_ids": pa.int32(), **BY_TOKEN, **TOP_K, **OLD}
_OF_ROW = {
    **dict.fromkeys(("rollout", "update"), pa.int32()),
    "step": pa.int64(),
    **dict.fromkeys(("rank", "micro_batch", "row", "width", "sample"), pa.int32()),
    "problem": pa.string(),
    "group": pa.int32(),
    "policy_version": pa.int64(),
    **dict.fromkeys(("reward", "advantage"), pa.float32()),
}
SCHEMA = pa.schema({**_OF_ROW, **{name: pa.list_(kind) for name, kind in LISTS.items()}})


class Place(NamedTuple):
    """Where in a run a micro-batch was: numbers from 0."""

    rollout: int
    update: int  # of its rollout
    step: int  # optimizer steps taken before it
    rank: int  # among those that have problems of their own
    micro_batch: int  # of its update, on its rank


@dataclass(frozen=True)
class Recorded:
    """One micro-batch of B responses, and what the run's trust region answered."""

    place: Place
    batch: RolloutBatch  # a RecomputedBatch where samples carry log pi_old
    logp: Tensor  # [B, T] float32, log pi(y_t | s_t) at this update
    topk_logp: Tensor | None  # [B, T, K] float32, log pi at batch.topk_ids
    gate: Gate  # as the run made it, without its diagnostics
    problems: list[str]  # [B] ids

    @property
    def stats(self) -> TokenStats:
        """What the trust region saw."""
        return self.batch.stats(self.logp, self.topk_logp)

    @property
    def top_k(self) -> int:
        """K of its top-K entries, 0 for none."""
        return 0 if self.batch.topk_ids is None else self.batch.topk_ids.shape[-1]
