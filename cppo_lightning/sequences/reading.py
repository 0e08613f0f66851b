"""What the model reads of a batch.

Shapes: B rows of the batch, S prompt tokens, T response tokens, M trainable tokens.  The model reads N rows of L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from cppo_lightning.batch import RolloutBatch


@dataclass(frozen=True)
class Extent:
    """Which tokens of a batch there are, on the host."""

    prompts: list[int]  # tokens, by row
    responses: list[int]  # up to the last trainable token: those before it that are not trained on are context
    mask: Tensor  # [B, T] bool, True on trainable tokens

    @classmethod
    def of(cls, batch: RolloutBatch) -> Self:
        mask = batch.response_mask
        after = mask.byte().flip(-1).argmax(-1) if mask.shape[1] else 0
        lengths = torch.stack([batch.prompt_mask.sum(-1), (mask.shape[1] - after) * mask.any(-1)])
        prompts, responses = lengths.tolist()
        return cls(prompts, responses, mask.cpu())

    def select(self, rows: Sequence[int]) -> Self:
        """The given rows, cut to their longest response, as ``RolloutBatch.select`` does."""
        prompts, responses = ([of[row] for row in rows] for of in (self.prompts, self.responses))
        return replace(self, prompts=prompts, responses=responses, mask=self.mask[rows][:, : max(responses, default=0)])


@dataclass(frozen=True)
class Sequences:
    """What a model reads of a batch of rows, and where it says something of their tokens.

    Each sequence is a row with padding on its right or, where they are ``packed``, all are one row without any.
    """

    source: Tensor  # [N, L] int64, each token's place in the flattened prompts [B * S] and, after them, responses [B * T]
    positions: Tensor  # [N, L] int64, tokens before it in its sequence, those of other responses not counted
    sequence: Tensor  # [N, L] int64, number of its sequence, -1 for padding
    branch: Tensor  # [N, L] int64, 0 for the prompt, 1 and so on for its responses, -1 for padding
    predicting: Tensor  # [M] int64, place in [N * L] of the state that predicts each trainable token
    trained: Tensor  # [M] int64, place in [B * T] of each trainable token, ascending
    branches: int  # most responses of a sequence
    packed: bool

    @classmethod
    def of(
        cls,
        batch: RolloutBatch,
        rows: Sequence[Sequence[int]] | None = None,
        packed: bool = False,
        extent: Extent | None = None,
    ) -> Self:
        """Sequences of the given rows of ``batch`` each.

        Args:
            rows: those of one sequence have the same prompt; None is a sequence for each row.
            packed: puts all into one row.
            extent: the batch's, where it is known; reading it waits for the device.
        """
        extent = Extent.of(batch) if extent is None else extent
        rows = [[row] for row in range(len(batch))] if rows is None else rows
        mask = extent.mask
        totals = [extent.prompts[members[0]] + sum(extent.responses[row] for row in members) for members in rows]
        shape = (1, sum(totals)) if packed else (len(rows), max(totals, default=0))
        starts = accumulate(totals, initial=0) if packed else count(0, shape[1])
        widths = (batch.prompt_ids.shape[1], mask.shape[1])
        found = list(_runs(extent, widths, rows, starts))
        runs = torch.tensor(found, dtype=torch.int64).view(len(found), len(_Run._fields))
        of_run = torch.arange(len(runs)).repeat_interleave(runs[:, 0])
        behind = torch.arange(len(of_run)) - (runs[:, 0].cumsum(0) - runs[:, 0])[of_run]  # the first of its run
        _, place, source, position, sequence, branch, before = runs[of_run].unbind(-1)
        place, source = place + behind, source + behind
        # a token is predicted by the one before it, a response's first by the prompt's last
        state = torch.zeros(len(mask) * sum(widths), dtype=torch.int64)
        state[source] = torch.where(behind == 0, before, place - 1)
        trained = mask.flatten().nonzero().flatten()

        def laid_out(values: Tensor, padding: Tensor) -> Tensor:
            return padding.expand(shape).flatten().index_copy(0, place, values).view(shape)

        zero = torch.zeros(1, dtype=torch.int64)
        sequences = cls(
            source=laid_out(source, zero),
            # padding counts on: transformers takes positions that begin anew for several sequences in a row, and masks them
            positions=laid_out(position + behind, torch.arange(shape[1])),
            sequence=laid_out(sequence, zero - 1),
            branch=laid_out(branch, zero - 1),
            predicting=state[trained + len(mask) * widths[0]],
            trained=trained,
            branches=max(map(len, rows), default=0),
            packed=packed,
        )
        return sequences.to(batch.response_ids.device)

    def to(self, device: Any) -> Self:
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def attention_mask(self, dtype: torch.dtype) -> Tensor | BlockMask | None:
        """Flex attention's mask ``[1, 1, L, L]`` of packed sequences, else one ``[N, 1, L, L]`` that is added to attention's
        scores; None where plain causal attention is right.

        Args:
            dtype: that attention computes in.  Of any other, and of a boolean mask, each layer would keep a copy for the
                backward pass.
        """
        if self.branches <= 1 and not self.packed:
            return None  # nothing attends to what comes after it, so not to padding either
        rows, length = self.source.shape
        sees, device = _sees(self.sequence, self.branch), self.source.device
        if self.packed:
            from torch.nn.attention.flex_attention import create_block_mask

            # uncompiled it holds all pairs at once
            create: Any = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
            return create(sees, None, None, length, length, device=device)
        row, token = torch.arange(rows, device=device).view(-1, 1, 1, 1), torch.arange(length, device=device)
        seen = sees(row, None, token[:, None], token)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


class _Run(NamedTuple):
    """Tokens that stand together: a prompt, or a response behind one."""

    tokens: int
    place: int  # of the first of them in [N * L]
    source: int  # of the first
    position: int  # of the first
    sequence: int
    branch: int
    before: int  # place of the state that predicts the first


def _runs(extent: Extent, widths: tuple[int, int], rows: Sequence[Sequence[int]], starts: Iterable[int]) -> Iterator[_Run]:
    """Those of each sequence; ``widths`` are S and T, ``starts`` the sequences' places in [N * L]."""
    responses = len(extent.prompts) * widths[0]  # source of the first
    for number, (members, start) in enumerate(zip(rows, starts, strict=False)):
        prompt = extent.prompts[members[0]]
        yield _Run(prompt, start, (members[0] + 1) * widths[0] - prompt, 0, number, 0, start)
        end = start + prompt
        for branch, row in enumerate(members, 1):
            tokens = extent.responses[row]
            yield _Run(tokens, end, responses + row * widths[1], prompt, number, branch, start + prompt - 1)
            end += tokens


def _sees(sequence: Tensor, branch: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Whether one token attends to another, as flex attention asks: by row, head, place of the one and place of the other."""

    def sees(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        prompt_or_own = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
        return (key <= query) & (sequence[row, key] == sequence[row, query]) & prompt_or_own

    return sees
