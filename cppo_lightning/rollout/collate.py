"""From judged samples to the tensors of one minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.mismatch import RecomputedBatch

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.rollout.sampler import Sample


def collate(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    places: Sequence[int],
    n: int,
    version: int,
    top_k: int,
    pad_id: int,
    recomputed: bool = False,
) -> RolloutBatch:
    """Stack samples (possibly none) into one CPU batch: prompts padded left, responses right.

    ``places`` are those of the samples in their rollout, which has ``n`` for each problem.  ``top_k`` is the K of the batch's
    top-K tensors; 0 leaves them out.  ``recomputed`` says that samples carry ``old_logp``.
    """
    prompts = [torch.tensor(s.prompt_ids) for s in samples]
    completions = [s.completion for s in samples]
    lengths = torch.tensor([len(c.ids) for c in completions], dtype=torch.int64)
    width = int(lengths.max()) if len(samples) else 0
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    prompt_width = int(prompt_lengths.max()) if len(samples) else 0
    topk = None
    if top_k:
        topk = (
            _pad_right([_rows(c.topk_ids, top_k) for c in completions], width, (top_k,), torch.int64),
            _pad_right([_rows(c.topk_logp, top_k) for c in completions], width, (top_k,), torch.float32),
        )
    batch = RolloutBatch(
        prompt_ids=_pad_right([p.flip(0) for p in prompts], prompt_width, (), torch.int64, pad_id).flip(-1),
        prompt_mask=(torch.arange(prompt_width) < prompt_lengths[:, None]).flip(-1),
        response_ids=_pad_right([c.ids for c in completions], width, (), torch.int64, pad_id),
        response_mask=torch.arange(width) < lengths[:, None],
        rollout_logp=_pad_right([c.logp for c in completions], width, (), torch.float32),
        advantages=torch.tensor(list(advantages), dtype=torch.float32),
        rewards=torch.tensor([s.verdict.reward for s in samples], dtype=torch.float32),
        group=torch.tensor([place // n for place in places], dtype=torch.int64),
        policy_version=torch.full((len(samples),), version, dtype=torch.int64),
        topk_ids=None if topk is None else topk[0],
        topk_rollout_logp=None if topk is None else topk[1],
        sample=torch.tensor(list(places), dtype=torch.int64),
    )
    if not recomputed:
        return batch
    old = [s.old_logp for s in samples if s.old_logp is not None]
    if len(old) < len(samples):
        raise ValueError(f"{len(samples) - len(old)} of {len(samples)} samples were not recomputed")
    return RecomputedBatch(**vars(batch), old_logp=_pad_right(old, width, (), torch.float32))


def _rows(values: Tensor | None, top_k: int) -> Tensor:
    found = 0 if values is None else values.shape[1]
    if values is None or found < top_k:
        raise ValueError(f"a sample has the log-probabilities of the top {found} tokens, but {top_k} were asked for")
    return values[:, :top_k]


def _pad_right(rows: list[Tensor], width: int, trailing: tuple[int, ...], dtype: torch.dtype, value: float = 0) -> Tensor:
    out = torch.full((len(rows), width, *trailing), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
