"""The order in which problems are handed out: every set shuffled anew at each pass, and sets interleaved by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Problem


class PromptOrder:
    """Problems in an order that a seed fixes.

    Without shares, every problem once, in a new shuffle each pass.  With them, each set goes through shuffles of its own, and
    among the first n problems it has its share of n, off by at most half a problem for each other set, whatever n is.
    ``position`` counts problems handed out and is all the state there is.

    Args:
        problems: what is handed out.
        seed: of the shuffles.
        shares: how often each set (``Problem.dataset``) is drawn, in any unit; None for one shuffle of them all.

    Raises:
        ConfigError: no problems, a set without problems, or a problem of a set without a share.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, shares: Mapping[str, float] | None = None) -> None:
        self.problems = problems
        self.seed = seed
        self.position = 0
        if not problems:
            raise ConfigError("there are no problems to hand out")
        if shares is None:
            self._sets, self._splits = [_Shuffle(problems, seed)], []
            return
        sets: dict[str, list[Problem]] = {name: [] for name in shares}
        for problem in problems:
            if problem.dataset not in sets:
                raise ConfigError(
                    f"problem {problem.id!r} is of the set {problem.dataset!r}, which has no weight: {dict(shares)}"
                )
            sets[problem.dataset].append(problem)
        if empty := [name for name, members in sets.items() if not members]:
            raise ConfigError(f"no problem is left of {empty}; take out the set or find out why")
        self._sets = [_Shuffle(members, _seed_of(seed, name)) for name, members in sets.items()]
        self._splits = _splits([Fraction(str(share)) for share in shares.values()])

    def take(self, count: int) -> list[Problem]:
        """The next ``count`` problems."""
        taken = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Problem:
        for shuffle, split in zip(self._sets, self._splits, strict=False):
            before = _rounded(position * split)
            if _rounded((position + 1) * split) > before:
                return shuffle.at(before)
            position -= before  # the place among the sets that remain
        return self._sets[-1].at(position)


class _Shuffle:
    """Some problems for ever, in a new order each pass."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems = problems
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def at(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self.problems))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.problems), generator=generator).tolist())
        return self.problems[self._order[1][index]]


def _splits(shares: Sequence[Fraction]) -> list[Fraction]:
    """For each set but the last, its share of what it and the sets after it get."""
    return [share / sum(shares[i:]) for i, share in enumerate(shares[:-1])]


def _rounded(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def _seed_of(seed: int, name: str) -> int:
    """A seed for one set: sets of one size would otherwise share their shuffles and meet the same partners at each pass."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
