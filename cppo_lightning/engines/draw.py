"""Drawing one token per row from logits, with its log-probability and the top-K of the distribution drawn from.

Shapes: R rows, V vocabulary, K top-k entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.engines.engine import Sampling

# a nucleus rarely holds more tokens than this, and finding so few costs a fraction of a full sort
NUCLEUS_GUESS = 256
# about the root of a vocabulary, so that neither blocks nor their entries are many
BLOCK = 256
BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class Draw:
    """The drawn tokens and what mu, the distribution they were drawn from, says; float32."""

    ids: Tensor  # [R] int64
    logp: Tensor  # [R] log mu of the drawn token
    topk_ids: Tensor | None  # [R, K] int64, most likely first
    topk_logp: Tensor | None  # [R, K], -inf where truncation left fewer than K tokens


def draw(logits: Tensor, sampling: Sampling, top_logprobs: int, generator: torch.Generator) -> Draw:
    """Draw from ``softmax(logits / temperature)``, truncated and renormalised as ``sampling`` says.

    Temperature 0 takes the most likely token and reports log-probabilities at temperature 1, without truncation.

    Args:
        logits: ``[R, V]`` in any float dtype; overwritten when float32.
        top_logprobs: K, or 0 for none.
    """
    logits = logits.float()
    greedy = sampling.temperature == 0
    if not greedy:
        if sampling.temperature != 1:
            logits.div_(sampling.temperature)
        _truncate(logits, sampling)
    top = logits.topk(top_logprobs, dim=-1) if top_logprobs else None
    highest = logits.amax(-1, keepdim=True)
    blocks = _blocks((logits - highest).exp_())
    # float32 cannot resolve the tail of a large vocabulary near its end
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    normaliser = highest + ends[:, -1:].log().float()
    ids = logits.argmax(-1, keepdim=True) if greedy else _invert_cdf(blocks, ends, generator)
    ids.clamp_(max=logits.shape[-1] - 1)  # logits that are not numbers put it behind all entries
    return Draw(
        ids=ids[:, 0],
        logp=(logits.gather(-1, ids) - normaliser)[:, 0],
        topk_ids=None if top is None else top.indices,
        topk_logp=None if top is None else top.values - normaliser,
    )


def _blocks(mass: Tensor) -> Tensor:
    """``[R, V]`` as ``[R, blocks, BLOCK]``, the last one filled up with zeros."""
    return pad(mass, (0, -mass.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _invert_cdf(blocks: Tensor, ends: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index ``[R, 1]`` per row in proportion to ``blocks`` ``[R, blocks, BLOCK]``; an entry of 0 is never drawn.

    One uniform number per row, where ``torch.multinomial`` spends an exponential per entry.  It falls into a block, whose sums
    end at ``ends`` ``[R, blocks]``, and there on an entry, so that float64 is spent on few sums: a third of the time of all.
    """
    uniform = torch.rand(len(ends), 1, dtype=torch.float64, device=ends.device, generator=generator)
    target = uniform * ends[:, -1:]
    # right=True finds the first end above the target, and what ends there has mass
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    start, end = (sums.gather(-1, block) for sums in (pad(ends[:, :-1], (1, 0)), ends))
    share = ((target - start) / (end - start)).clamp_(max=BELOW_ONE)
    cdf = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    return block * BLOCK + torch.searchsorted(cdf, share * cdf[:, -1:], right=True)


def _truncate(logits: Tensor, sampling: Sampling) -> None:
    """Set logits outside min-p, top-k and top-p (applied in vLLM's order) to -inf, in place; ties at the edge are kept."""
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits.masked_fill_(logits < floor, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits.masked_fill_(logits < floor, -math.inf)
    if sampling.top_p < 1:
        logits.masked_fill_(logits < _nucleus_floor(logits, sampling.top_p), -math.inf)


def _nucleus_floor(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit ``[R, 1]`` of the smallest set of most likely tokens whose probability reaches ``top_p``."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    vocabulary = logits.shape[-1]
    values = logits.topk(min(NUCLEUS_GUESS, vocabulary), dim=-1).values
    mass = (values - normaliser).exp().cumsum(-1)
    if values.shape[-1] < vocabulary and bool((mass[:, -1] < top_p).any()):
        values = logits.sort(dim=-1, descending=True).values
        mass = (values - normaliser).exp().cumsum(-1)
    # entries strictly before the one that reaches top_p
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=values.shape[-1] - 1)
    return values.gather(-1, last)
