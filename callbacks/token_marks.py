"""Which tokens of a response a gate dropped and why, and the response's text with those tokens in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cppo_lightning.batch import Gate, TokenStats


class Cause(IntEnum):
    """What became of a token."""

    KEPT = 0  # also one that was not trained on
    THRESHOLD = 1  # dropped by the token threshold
    BUDGET = 2  # dropped by the prefix budget
    OTHER = 3  # dropped by a trust region that tells no causes


Piece = tuple[Cause, str]  # a stretch of text whose tokens have the same cause

BRACKETS = {Cause.THRESHOLD: "⟦⟧", Cause.BUDGET: "⟪⟫", Cause.OTHER: "⟨⟩"}
NAMES = {Cause.THRESHOLD: "the token threshold", Cause.BUDGET: "the prefix budget", Cause.OTHER: "the trust region"}
_UNSEEN = -1  # below every cause: a token that no micro-batch has had
_AHEAD = 3  # tokens that may complete a character, which has up to four bytes


def causes(stats: TokenStats, gate: Gate) -> Tensor:
    """The :class:`Cause` of every token, ``[B, T]`` int8."""
    dropped = stats.mask & ~gate.keep
    found = dropped.to(torch.int8) * Cause.OTHER
    for name, cause in (("masked_by_position", Cause.THRESHOLD), ("masked_by_budget", Cause.BUDGET)):
        if name in gate.diagnostics:
            found = found.masked_fill(dropped & gate.diagnostics[name], cause)
    return found


class ChosenCauses:
    """What became of the tokens of some responses in one update: kept where the gates are, and read when it ends.

    Args:
        places: ``[N]`` int64, the responses' places in this rank's ``Rollout.samples``.
    """

    def __init__(self, places: Tensor) -> None:
        self.places = places
        self._found = torch.full((len(places), 0), _UNSEEN, dtype=torch.int8, device=places.device)  # [N, T]

    def add(self, stats: TokenStats, gate: Gate) -> None:
        """Take one micro-batch in, without waiting for the device."""
        if stats.sample is None:
            return
        trained = (stats.sample == self.places[:, None]) & stats.mask.any(-1)  # [N, B]
        rows = causes(stats, gate)[trained.int().argmax(-1)]
        width = max(rows.shape[1], self._found.shape[1])
        # a response is in one micro-batch of an update, and unseen in the others
        self._found = _widened(self._found, width).maximum(
            _widened(rows.masked_fill(~trained.any(-1, keepdim=True), _UNSEEN), width)
        )

    def read(self) -> dict[int, list[int]]:
        """The :class:`Cause` of each token, up to the width of its micro-batch or further, by the response's place."""
        found = zip(self.places.tolist(), self._found.tolist(), strict=True)
        return {place: [max(cause, Cause.KEPT) for cause in row] for place, row in found if max(row, default=_UNSEEN) >= 0}


def pieces(ids: list[int], token_causes: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The text of the tokens ``ids``, cut where the cause changes; a character made of tokens on both sides goes to the later.

    A stretch is decoded together with the one before it, since many tokenizers decode a text's first token in another way.
    """

    def decode(first: int, end: int) -> str:
        return str(tokenizer.decode(ids[first:end]))

    def settled(first: int, end: int) -> str:
        """The text of some tokens as far as the tokens after them leave it as it is."""
        text, longer = decode(first, end), decode(first, end + _AHEAD)
        while not longer.startswith(text):
            text = text[:-1]
        return text

    found: list[Piece] = []
    first = end = 0
    for cause, stretch in groupby(token_causes):
        start, end = end, end + len(list(stretch))
        known = settled(first, start)
        found.append((Cause(cause), settled(first, end)[len(known) :]))
        if known == decode(first, start):  # else a character lies across, of which the next stretch may be a part too
            first = start
    return found


def bracketed(texts: Sequence[Piece]) -> str:
    """One text with what was dropped in brackets; brackets of these kinds that are in the texts appear as escapes."""
    return "".join(
        _escaped(text) if cause is Cause.KEPT else BRACKETS[cause][0] + _escaped(text) + BRACKETS[cause][1]
        for cause, text in texts
    )


def counted(token_causes: Sequence[int]) -> str:
    """How many tokens were dropped by what, with the brackets that stand for it; "no token dropped" if none."""
    dropped = {cause: token_causes.count(cause) for cause in BRACKETS if cause in token_causes}
    if not dropped:
        return "no token dropped"
    each = [f"{number} by {NAMES[cause]} {BRACKETS[cause][0]}so{BRACKETS[cause][1]}" for cause, number in dropped.items()]
    return f"{sum(dropped.values())} of {len(token_causes)} tokens dropped, {', '.join(each)}"


def _widened(found: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(found, (0, width - found.shape[1]), value=_UNSEEN)


def _escaped(text: str) -> str:
    return "".join(c.encode("unicode_escape").decode() if c in "".join(BRACKETS.values()) else c for c in text)
