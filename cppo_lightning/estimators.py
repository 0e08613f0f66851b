"""avg@k, pass@k, maj@k and bootstrap intervals: pure functions of what k samples of each problem gave.

Shapes: P problems, n samples of each, R resamples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NO_VOTE = -1
RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # numbers that the bootstrap holds at a time


def avg_at(correct: npt.ArrayLike) -> Floats:
    """Share of correct samples of each problem ``[P]``, from ``correct`` ``[P, n]`` bool; its mean is avg@n.

    Raises:
        ValueError: not a table with at least one problem and one sample.
    """
    return _table(correct).mean(1)


def pass_at(correct: npt.ArrayLike, k: int) -> Floats:
    """Probability ``[P]`` that at least one of k samples, drawn from a problem's n without replacement, is correct.

    Of n samples with c correct it is ``1 - C(n - c, k) / C(n, k)``, an unbiased estimate of pass@k (Chen et al. 2021, arXiv
    2107.03374, Eq. 1), as the product ``1 - prod_{i = n - c + 1}^{n} (1 - k / i)``, in which nothing overflows.

    Args:
        correct: ``[P, n]`` bool.
        k: 1 to n.

    Raises:
        ValueError: not such a table, or another k.
    """
    table = _table(correct)
    n = table.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k of {n} samples needs k from 1 to {n}, got {k}")
    i = np.arange(1, n + 1)
    # a factor below 0 stands after one that is 0
    factors = np.clip(1 - k / i, 0, None)
    taken = i > n - table.sum(1, keepdims=True)  # [P, n]
    return 1 - np.where(taken, factors, 1).prod(1)


def pass_ks(n: int) -> list[int]:
    """The k above 1 that pass@k is given for: powers of two up to n, and n itself; pass@1 is avg@n."""
    powers = [2**i for i in range(1, n.bit_length())]
    return powers if n in (1, *powers) else [*powers, n]


def maj_at(correct: npt.ArrayLike, votes: npt.ArrayLike) -> Floats:
    """Probability ``[P]`` that the answer given most often is correct; its mean is maj@n.

    Equal answers have equal votes.  Among answers given equally often one is drawn, and the expectation over this draw is
    taken.  A sample without a readable answer has no vote; a problem without any vote counts 0.  Should the verifier judge
    equal answers differently, their share of correct ones counts.

    Args:
        correct: ``[P, n]`` bool.
        votes: ``[P, n]`` int, :data:`NO_VOTE` for none.

    Raises:
        ValueError: not two such tables of one shape.
    """
    table, voted = _table(correct), np.asarray(votes)
    if voted.shape != table.shape:
        raise ValueError(f"votes must have the shape {table.shape} of correct, got {voted.shape}")
    return np.array([_majority(*row) for row in zip(table, voted, strict=True)])


def _majority(correct: Floats, votes: npt.NDArray[np.int64]) -> float:
    cast = votes != NO_VOTE
    if not cast.any():
        return 0.0
    _, answer, times = np.unique(votes[cast], return_inverse=True, return_counts=True)
    right = np.bincount(answer, weights=correct[cast]) / times  # [answers]
    return float(right[times == times.max()].mean())


def resampled_means(values: npt.ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Means ``[R]`` of P problems drawn from ``values`` ``[P]`` with replacement (Efron 1979), the same for one seed.

    The order of the problems does not matter: what is drawn is how often each distinct value occurs.

    Raises:
        ValueError: no values, or a number of them that is not finite.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise ValueError(f"the bootstrap needs one finite value per problem, got {given}")
    distinct, counts = np.unique(given, return_counts=True)
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // len(distinct))
    parts = [
        generator.multinomial(given.size, counts / given.size, min(size, resamples - first)) @ distinct
        for first in range(0, resamples, size)
    ]
    return np.concatenate(parts) / given.size


def interval(means: Floats, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap percentile interval: the middle ``level`` of the resampled means ``[R]``.

    It has no width where all problems have one value, however few they are.

    Raises:
        ValueError: ``level`` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must be in (0, 1), got {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _table(correct: npt.ArrayLike) -> Floats:
    table = np.asarray(correct, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isin(table, (0, 1)).all():
        raise ValueError(f"correct must be a table of problems and samples, true or false, got the shape {table.shape}")
    return table
