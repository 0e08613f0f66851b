"""Which rows of a minibatch go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch

from cppo_lightning.sequences.reading import Extent, Sequences
from cppo_lightning.sequences.work import Work

if TYPE_CHECKING:
    from cppo_lightning.batch import RolloutBatch

# what a forward pass costs besides its tokens (kernels are started, weights read, and gathered where they are sharded), as a
# share of what ``max_tokens`` cost; with less, there is less padding in more and smaller passes
PASS = 1 / 32
# what padding may make of ``max_tokens`` where sequences are packed: numbers about tokens are [B, T] all the same
PADDED = 4


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a minibatch, for one forward pass."""

    batch: RolloutBatch
    sequences: Sequences

    @classmethod
    def blank(cls, batch: RolloutBatch) -> Self:
        """One row without a trainable token: it adds nothing, but takes part in collectives."""
        row = batch.blank()
        return cls(row, Sequences.of(row))


def micro_batches(batch: RolloutBatch, max_tokens: int, work: Work | None = None) -> list[MicroBatch]:
    """Split a minibatch into parts of at most ``max_tokens`` tokens with padding (a longer sequence gets a part of its own).

    A part holds sequences of about one length.  Those that take longest come first: ranks that wait for each other at each part
    wait least then.  Rows without a trainable token are in none.

    Args:
        batch: rows of one ``group`` have the same prompt.
        max_tokens: of a part.
        work: decides which responses share a sequence, and whether sequences are packed; None gives each response one of its
            own, and packs nothing.

    Raises:
        ValueError: two rows of a group have different prompts.
    """
    if not len(batch):
        return []
    extent = Extent.of(batch)
    sequences = sorted(_sequences(extent, batch.group.tolist(), max_tokens, work), key=lambda found: -found[0])
    _check_prompts(batch, [rows for _, rows in sequences])
    packed = work is not None and work.skips_hidden
    parts = [sequences[part] for part in _parts([length for length, _ in sequences], max_tokens, packed)]
    cost = work or Work(1, 0)
    parts.sort(key=lambda part: -sum(cost.of(1, length if packed else part[0][0]) for length, _ in part))
    return [_micro_batch(batch, extent, [rows for _, rows in part], packed) for part in parts]


def _parts(lengths: Sequence[int], max_tokens: int, packed: bool) -> list[slice]:
    """Of ``lengths``, which descend, the stretches that cost least together (tokens with padding, and ``PASS`` for each)."""
    sums = list(accumulate(lengths, initial=0))

    def tokens(first: int, end: int) -> int:
        return sums[end] - sums[first] if packed else padded(first, end)

    def padded(first: int, end: int) -> int:
        return (end - first) * lengths[first]

    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of all before an end, and where their last stretch begins
    for end in range(1, len(lengths) + 1):
        found = (best[end - 1][0] + lengths[end - 1], end - 1)
        for first in range(end - 2, -1, -1):
            if (size := tokens(first, end)) > max_tokens or padded(first, end) > PADDED * max_tokens:
                break
            found = min(found, (best[first][0] + size, first))
        best.append((found[0] + PASS * max_tokens, found[1]))
    parts, end = [], len(lengths)
    while end:
        parts.append(slice(best[end][1], end))
        end = parts[-1].start
    return parts[::-1]


def _micro_batch(batch: RolloutBatch, extent: Extent, part: Sequence[Sequence[int]], packed: bool) -> MicroBatch:
    rows = [row for members in part for row in members]
    taken = batch.select(torch.tensor(rows, device=batch.response_ids.device))
    numbers = iter(range(len(rows)))
    local = [[next(numbers) for _ in members] for members in part]
    return MicroBatch(taken, Sequences.of(taken, local, packed, extent.select(rows)))


def _sequences(extent: Extent, groups: list[int], max_tokens: int, work: Work | None) -> list[tuple[int, list[int]]]:
    """Length and rows of each sequence: a group's responses, longest first, join while that is less work."""
    found: list[tuple[int, list[int]]] = []
    group = None
    trained = [row for row, response in enumerate(extent.responses) if response]
    for row in sorted(trained, key=lambda row: (groups[row], -extent.responses[row])):
        prompt, response = extent.prompts[row], extent.responses[row]
        if work is not None and groups[row] == group:
            length, members = found[-1]
            if length + response <= max_tokens and work.shares(prompt, length, response):
                found[-1] = (length + response, [*members, row])
                continue
        found.append((prompt + response, [row]))
        group = groups[row]
    return found


def _check_prompts(batch: RolloutBatch, sequences: Sequence[Sequence[int]]) -> None:
    shared = [(rows[0], row) for rows in sequences for row in rows[1:]]
    if not shared:
        return
    first, other = torch.tensor(shared, device=batch.prompt_ids.device).unbind(-1)
    if not torch.equal(*(torch.where(batch.prompt_mask[rows], batch.prompt_ids[rows], -1) for rows in (first, other))):
        raise ValueError("rows of the batch have one group and different prompts; RolloutBatch.group numbers the prompts")
