"""How a minibatch goes through the model: responses behind the prompt that they share, sequences of about one length together.

Shapes: B rows, S prompt tokens, T response tokens, N sequences, L tokens of the longest sequence, M trainable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cppo_lightning.batch import RolloutBatch

Lengths = tuple[list[int], list[int]]  # by row, of prompts and of responses


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a causal LM's forward pass.

    Args:
        per_token: of its matrices.
        per_pair: of attention, for two tokens of which one attends to the other.
    """

    per_token: float
    per_pair: float

    def shares(self, prompt: int, length: int, response: int) -> bool:
        """Whether a response is less work behind a sequence than behind the prompt alone, in a sequence of its own.

        Attention computes every pair of a sequence's tokens, those of two responses too, which do not attend to each other.
        """
        joined = response * self.per_token + ((length + response) ** 2 - length**2) * self.per_pair
        alone = (prompt + response) * self.per_token + (prompt + response) ** 2 * self.per_pair
        return joined <= alone


@dataclass(frozen=True)
class Sequences:
    """What a model reads of a batch of rows, and where it says something of their tokens.  Padding is on the right."""

    source: Tensor  # [N, L] int64, each token's place in the flattened prompts [B * S] and, after them, responses [B * T]
    positions: Tensor  # [N, L] int64, tokens before it, those of other responses not counted
    branch: Tensor  # [N, L] int64, 0 for the prompt, 1 and so on for its responses, -1 for padding
    predicting: Tensor  # [M] int64, place in [N * L] of the state that predicts each trainable token
    trained: Tensor  # [M] int64, place in [B * T] of each trainable token, ascending
    branches: int  # most responses of a sequence

    @classmethod
    def of(cls, batch: RolloutBatch, rows: Sequence[Sequence[int]] | None = None) -> Self:
        """Sequences of the given rows of ``batch`` each; None is one for each row."""
        return cls._of(batch, _lengths(batch), batch.response_mask.cpu(), rows or [[row] for row in range(len(batch))])

    @classmethod
    def _of(cls, batch: RolloutBatch, lengths: Lengths, mask: Tensor, rows: Sequence[Sequence[int]]) -> Self:
        prompts, responses = lengths
        (count, width), prompt_width = mask.shape, batch.prompt_ids.shape[1]
        longest = max((prompts[r[0]] + sum(responses[i] for i in r) for r in rows), default=0)
        source, branch = (torch.full((len(rows), longest), value) for value in (0, -1))
        # padding counts on: transformers takes positions that begin anew for several packed sequences, and would mask them
        positions = torch.arange(longest).repeat(len(rows), 1)
        state = torch.zeros(count, width, dtype=torch.int64)  # that predicts each token
        for n, members in enumerate(rows):
            prompt = end = prompts[members[0]]
            source[n, :end] = torch.arange(prompt_width - prompt, prompt_width) + members[0] * prompt_width
            branch[n, :end] = 0
            for number, row in enumerate(members, 1):
                place = slice(end, end + responses[row])
                own = torch.arange(responses[row])
                source[n, place] = own + count * prompt_width + row * width
                positions[n, place] = own + prompt
                branch[n, place] = number
                # a token is predicted by the one before it, the first by the prompt's last
                state[row, : responses[row]] = own + n * longest + end - 1
                state[row, 0] = n * longest + prompt - 1
                end = place.stop
        trained = mask.flatten().nonzero().flatten()
        found = cls(source, positions, branch, state.flatten()[trained], trained, max(map(len, rows), default=0))
        return found.to(batch.response_ids.device)

    def to(self, device: Any) -> Self:
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """``[N, 1, L, L]``, added to attention's scores; None where plain causal attention is right."""
        if self.branches <= 1:
            return None  # nothing attends to what comes after it, so not to padding either
        row, column = self.branch[:, :, None], self.branch[:, None, :]
        seen = ((column == 0) | (column == row)).tril()[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


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
    """Split a minibatch into parts of at most ``max_tokens`` padded tokens (a longer sequence gets a part of its own).

    Sequences are sorted by length first, which keeps padding small.

    Args:
        batch: rows of one ``group`` have the same prompt.
        max_tokens: of a part.
        work: decides which responses share a sequence; None gives each one of its own.

    Raises:
        ValueError: two rows of a group have different prompts.
    """
    if not len(batch):
        return []
    lengths, mask = _lengths(batch), batch.response_mask.cpu()
    sequences = sorted(_sequences(lengths, batch.group.tolist(), max_tokens, work), key=lambda found: -found[0])
    _check_prompts(batch, [rows for _, rows in sequences])
    parts: list[list[list[int]]] = []
    width = 0
    for length, rows in sequences:
        if not parts or width * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
            width = length  # sorted: the first of a part is its longest
        parts[-1].append(rows)
    return [_micro_batch(batch, lengths, mask, part) for part in parts]


def _micro_batch(batch: RolloutBatch, lengths: Lengths, mask: Tensor, part: Sequence[Sequence[int]]) -> MicroBatch:
    rows = [row for members in part for row in members]
    taken = batch.select(torch.tensor(rows, device=batch.response_ids.device))
    numbers = iter(range(len(rows)))
    local = [[next(numbers) for _ in members] for members in part]
    prompts, responses = ([of[row] for row in rows] for of in lengths)
    return MicroBatch(taken, Sequences._of(taken, (prompts, responses), mask[rows][:, : taken.response_mask.shape[1]], local))


def _sequences(lengths: Lengths, groups: list[int], max_tokens: int, work: Work | None) -> list[tuple[int, list[int]]]:
    """Length and rows of each sequence: a group's responses, longest first, join while that is less work."""
    found: list[tuple[int, list[int]]] = []
    group = None
    for row in sorted(range(len(groups)), key=lambda row: (groups[row], -lengths[1][row])):
        prompt, response = lengths[0][row], lengths[1][row]
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


def _lengths(batch: RolloutBatch) -> Lengths:
    """Tokens of each row's prompt, and of its response up to the last trainable one: those inside that are not are context."""
    width = batch.response_mask.shape[1]
    places = torch.arange(1, width + 1, device=batch.response_mask.device)
    ends = (batch.response_mask * places).amax(-1) if width else batch.response_mask.sum(-1)
    prompts, responses = torch.stack([batch.prompt_mask.sum(-1), ends]).tolist()
    return prompts, responses
