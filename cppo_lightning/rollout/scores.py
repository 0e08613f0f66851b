"""What an evaluation's answers amount to: avg@k, pass@k and maj@k with intervals over problems, per set and over sets."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cppo_lightning.estimators import NO_VOTE, Floats, avg_at, interval, maj_at, pass_at, pass_ks, resampled_means
from cppo_lightning.verifiers.base import Outcome
from cppo_lightning.verifiers.normalise import read_number, squeeze

Row = dict[str, Any]  # of one response, as EvaluationBatch.rows gives it

SHARES = ("truncated_share", "unparseable_share")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the ends of its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SetScores:
    """One set's scores, or the unweighted mean over sets.

    ``estimates`` are by name: ``avg@n``, and with n > 1 samples also ``pass@k`` for each of :func:`pass_ks` and ``maj@n``.
    ``maj@n`` is left out where answers are correct and none says what was read: their verifier does not tell.
    """

    problems: int
    estimates: Mapping[str, Estimate]
    truncated_share: float  # of responses
    unparseable_share: float  # of responses


@dataclass(frozen=True)
class Scores:
    """What every set gave.  In ``mean`` each set counts the same, and the intervals draw problems within each set."""

    samples: int  # n, responses to each problem
    sets: Mapping[str, SetScores]
    mean: SetScores

    def metrics(self) -> dict[str, float]:
        """The scores by TensorBoard tag: all of every set as ``eval/<set>/...``, the mean's at n samples as ``eval/...``."""
        tags: dict[str, float] = {}
        for name, scores in self.sets.items():
            for key, estimate in scores.estimates.items():
                tags |= _tags(f"eval/{name}/{key}", estimate)
            tags |= {f"eval/{name}/{share}": getattr(scores, share) for share in SHARES}
        for key, estimate in self.mean.estimates.items():
            if key.endswith(f"@{self.samples}"):  # others could be those of a second evaluation, of other sets
                tags |= _tags(f"eval/{key}", estimate)
        return tags


def _tags(tag: str, estimate: Estimate) -> dict[str, float]:
    return {tag: estimate.value, f"{tag}_low": estimate.low, f"{tag}_high": estimate.high}


def score(sets: Mapping[str, Sequence[Row]], samples: int) -> Scores:
    """The scores of each set's rows, which stand problem by problem, ``samples`` rows to each.

    Raises:
        ValueError: no sets, or rows that do not divide into problems.
    """
    found, drawn = {}, {}
    for name, rows in sets.items():
        values = _by_problem(rows, samples)
        # sets are drawn independently of each other, and each in the same way whatever others there are
        drawn[name] = {key: resampled_means(column, seed=zlib.crc32(name.encode())) for key, column in values.items()}
        found[name] = SetScores(
            problems=len(rows) // samples,
            estimates={key: Estimate(float(column.mean()), *interval(drawn[name][key])) for key, column in values.items()},
            truncated_share=sum(not row["finished"] for row in rows) / len(rows),
            unparseable_share=sum(row["outcome"] == Outcome.UNPARSEABLE for row in rows) / len(rows),
        )
    return Scores(samples, found, _mean(found, drawn))


def _mean(sets: Mapping[str, SetScores], drawn: Mapping[str, Mapping[str, Floats]]) -> SetScores:
    first, *others = sets.values()
    keys = [key for key in first.estimates if all(key in other.estimates for other in others)]
    return SetScores(
        problems=sum(scores.problems for scores in sets.values()),
        estimates={
            key: Estimate(
                sum(scores.estimates[key].value for scores in sets.values()) / len(sets),
                *interval(np.mean([drawn[name][key] for name in sets], axis=0)),
            )
            for key in keys
        },
        **{share: sum(getattr(scores, share) for scores in sets.values()) / len(sets) for share in SHARES},
    )


def _by_problem(rows: Sequence[Row], n: int) -> dict[str, Floats]:
    """What each problem ``[P]`` contributes to each estimate."""
    if not rows or len(rows) % n:
        raise ValueError(f"{len(rows)} rows do not divide into problems of {n} samples")
    correct = np.array([row["outcome"] == Outcome.CORRECT for row in rows]).reshape(-1, n)
    values = {f"avg@{n}": avg_at(correct)}
    if n > 1:
        values |= {f"pass@{k}": pass_at(correct, k) for k in pass_ks(n)}
        votes = np.array([_votes(rows[first : first + n]) for first in range(0, len(rows), n)])
        if (votes != NO_VOTE).any() or not correct.any():
            values[f"maj@{n}"] = maj_at(correct, votes)
    return values


def _votes(rows: Sequence[Row]) -> list[int]:
    """A number for each different answer to one problem; numbers are compared by value, formulas as text without spacing."""
    votes: list[int] = []
    known: dict[str, int] = {}
    for row in rows:
        answer = row["extracted"]
        if answer is None or row["outcome"] == Outcome.UNPARSEABLE:
            votes.append(NO_VOTE)
        else:
            votes.append(known.setdefault(read_number(answer) or squeeze(answer), len(known)))
    return votes
