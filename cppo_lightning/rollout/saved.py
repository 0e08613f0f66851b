"""Rollouts in checkpoints: what was sampled and not trained on yet, as tensors and plain values, for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cppo_lightning.engines.engine import Completion
from cppo_lightning.rollout.sampler import Rollout, Sample
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict

_OF_COMPLETION = ("ids", "logp", "topk_ids", "topk_logp")


@dataclass(frozen=True)
class Hand:
    """A rollout dealt to updates.

    Args:
        rollout: what was sampled, groups that are not trained on included.
        advantages: ``[P, G]`` float32, of every sample.
        shares: for each update the numbers of its groups.
        trained: updates that have been taken.
    """

    rollout: Rollout
    advantages: Tensor
    shares: list[list[int]]
    trained: int = 0


@dataclass(frozen=True)
class Unfinished:
    """What a rank holds between two updates.

    Args:
        hand: the rollout that is being trained on; None between rollouts.
        ahead: the rollout that comes after it, where that is there already.
        generators: the states of the process's random generators; None starts from the run's seed.
    """

    hand: Hand | None = None
    ahead: Rollout | None = None
    generators: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values alone.  A problem's ``metadata`` stays out: it may be anything, and verdicts are there."""
        hand = self.hand
        return {
            "hand": hand and {**vars(hand), "rollout": _packed(hand.rollout)},
            "ahead": self.ahead and _packed(self.ahead),
            "generators": self.generators,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Unfinished:
        """What ``state_dict`` was taken of."""
        hand, ahead = state["hand"], state["ahead"]
        return cls(
            hand and Hand(**{**hand, "rollout": _unpacked(hand["rollout"])}), ahead and _unpacked(ahead), state["generators"]
        )


def for_rank(parts: Sequence[Unfinished], rank: int, ranks: int) -> Unfinished:
    """What rank number ``rank`` of ``ranks`` goes on with, from what each rank of a run held.

    As many ranks as before go on with their own.  Otherwise groups are dealt anew, and each update keeps its own; random
    generators start from the run's seed.  A rollout that some rank did not have is drawn again.
    """
    hands = [part.hand for part in parts if part.hand is not None]
    aheads = [part.ahead for part in parts if part.ahead is not None]
    if len(parts) == ranks:
        mine = parts[rank]
        return replace(
            mine, hand=mine.hand if len(hands) == ranks else None, ahead=mine.ahead if len(aheads) == ranks else None
        )
    ahead = None
    if len(aheads) == len(parts):
        ahead = joined(aheads)
        groups = len(ahead.groups())
        ahead = _part(ahead, range(groups * rank // ranks, groups * (rank + 1) // ranks))
    return Unfinished(_dealt_anew(hands, rank, ranks) if len(hands) == len(parts) else None, ahead)


def _dealt_anew(hands: Sequence[Hand], rank: int, ranks: int) -> Hand:
    rollout = joined([hand.rollout for hand in hands])
    starts = list(accumulate((len(hand.rollout.groups()) for hand in hands), initial=0))
    updates = range(len(hands[0].shares))
    shares = [[start + g for start, hand in zip(starts, hands, strict=False) for g in hand.shares[u]] for u in updates]
    idle = sorted(set(range(starts[-1])) - {g for share in shares for g in share})
    mine = [share[rank::ranks] for share in shares]
    groups = sorted({g for share in mine for g in share} | set(idle[rank::ranks]))  # each pass has the same shares
    number = {g: i for i, g in enumerate(groups)}
    return Hand(
        _part(rollout, groups),
        torch.cat([hand.advantages for hand in hands])[groups],
        [[number[g] for g in share] for share in mine],
        hands[0].trained,
    )


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts of several ranks, with the same weights, as one that took the mean of their times."""
    return replace(
        rollouts[0],
        samples=[sample for rollout in rollouts for sample in rollout.samples],
        seconds_sampling=sum(rollout.seconds_sampling for rollout in rollouts) / len(rollouts),
        seconds_verifying=sum(rollout.seconds_verifying for rollout in rollouts) / len(rollouts),
    )


def _part(rollout: Rollout, groups: Sequence[int]) -> Rollout:
    found = rollout.groups()
    return replace(rollout, samples=[sample for g in groups for sample in found[g]])


def _packed(rollout: Rollout) -> dict[str, Any]:
    samples = rollout.samples
    tensors = {name: [getattr(s.completion, name) for s in samples] for name in _OF_COMPLETION}
    tensors["old_logp"] = [s.old_logp for s in samples]
    return {
        **{name: value for name, value in vars(rollout).items() if name != "samples"},
        "samples": [_plain(sample) for sample in samples],
        "tensors": {name: _together(rows) for name, rows in tensors.items()},
    }


def _unpacked(state: Mapping[str, Any]) -> Rollout:
    rows = {name: _apart(packed) for name, packed in state["tensors"].items()}
    samples = []
    for i, plain in enumerate(state["samples"]):
        tensors: dict[str, Any] = {name: rows[name][i] for name in _OF_COMPLETION}
        completion = Completion(**tensors, finished=plain["finished"])
        problem = Problem(**{**plain["problem"], "messages": tuple(plain["problem"]["messages"])})
        verdict = Verdict(**{**plain["verdict"], "outcome": Outcome(plain["verdict"]["outcome"])})
        samples.append(Sample(problem, plain["prompt_ids"], completion, plain["text"], verdict, rows["old_logp"][i]))
    return Rollout(**{**{k: v for k, v in state.items() if k != "tensors"}, "samples": samples})


def _plain(sample: Sample) -> dict[str, Any]:
    problem, verdict = sample.problem, sample.verdict
    texts = {name: getattr(problem, name) for name in ("id", "answer", "source", "dataset")}
    parts = {name: float(reward) for name, reward in verdict.parts.items()}
    return {
        "problem": {**texts, "messages": [dict(message) for message in problem.messages]},
        "verdict": {**asdict(verdict), "outcome": verdict.outcome.value, "reward": float(verdict.reward), "parts": parts},
        "prompt_ids": list(sample.prompt_ids),
        "text": sample.text,
        "finished": bool(sample.completion.finished),
    }


def _together(rows: Sequence[Tensor | None]) -> dict[str, Any]:
    """One tensor for all, since a row may be a view of a larger one, which would be saved whole; a length of -1 is None."""
    found = [row for row in rows if row is not None]
    return {"lengths": [-1 if row is None else len(row) for row in rows], "values": torch.cat(found) if found else None}


def _apart(packed: Mapping[str, Any]) -> list[Tensor | None]:
    lengths, values = packed["lengths"], packed["values"]
    found = iter([] if values is None else values.split([length for length in lengths if length >= 0]))
    return [None if length < 0 else next(found) for length in lengths]
