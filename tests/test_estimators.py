"""avg@k, pass@k, maj@k and intervals against brute force: all subsets, all tie-breaks, all resamples, closed forms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from cppo_lightning.estimators import NO_VOTE, avg_at, interval, maj_at, pass_at, pass_ks, resampled_means

ROWS = np.array(list(product([False, True], repeat=6)))  # every way in which six samples can come out


def any_of_k(row: tuple[bool, ...], k: int) -> Fraction:
    """Share of the subsets of k samples that hold a correct one."""
    subsets = list(combinations(row, k))
    return Fraction(sum(map(any, subsets)), len(subsets))


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_all_subsets(k: int) -> None:
    expected = [float(any_of_k(tuple(row), k)) for row in ROWS]
    np.testing.assert_allclose(pass_at(ROWS, k), expected, rtol=0, atol=1e-15)


def test_avg_is_pass_at_1() -> None:
    np.testing.assert_allclose(avg_at(ROWS), pass_at(ROWS, 1), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(avg_at(ROWS), ROWS.mean(1))


def test_pass_at_k_does_not_overflow_and_knows_what_is_certain() -> None:
    """Against exact fractions, with binomials of 600 digits; the ends are exact."""
    n = 2000
    table = np.arange(n) < np.array([[0], [1], [17], [n - 500], [n]])
    for k in (1, 500, 1999):
        expected = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in (0, 1, 17, n - 500, n)]
        found = pass_at(table, k)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert (found[0], found[-1]) == (0, 1)
    assert pass_at(table, n).tolist() == [0, 1, 1, 1, 1]


def test_pass_at_k_is_unbiased() -> None:
    """Its expectation over n samples, each correct with probability p, is the chance that one of k is: 1 - (1 - p)^k."""
    p, n = 0.3, 6
    chance = np.prod(np.where(ROWS, p, 1 - p), axis=1)
    for k in range(1, n + 1):
        assert chance @ pass_at(ROWS, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (10, [2, 4, 8, 10]), (16, [2, 4, 8, 16])]
)
def test_ks(n: int, ks: list[int]) -> None:
    assert pass_ks(n) == ks


def drawn_majority(correct: tuple[bool, ...], votes: tuple[int, ...]) -> Fraction:
    """Every order in which ties could be broken and every sample that could stand for the winner, each as likely."""
    counted = Counter(vote for vote in votes if vote != NO_VOTE)
    winners = [vote for vote, times in counted.items() if times == max(counted.values())]
    shares = []
    for winner in winners:
        right = [c for c, vote in zip(correct, votes, strict=True) if vote == winner]
        shares.append(Fraction(sum(right), len(right)))
    return sum(shares, Fraction(0)) / len(shares) if shares else Fraction(0)


def test_maj_is_the_expectation_over_ties() -> None:
    """All 3^4 votes among three answers and none, with all 2^4 verdicts."""
    cases = [(c, v) for c in product([False, True], repeat=4) for v in product([NO_VOTE, 0, 1], repeat=4)]
    correct, votes = (np.array(column) for column in zip(*cases, strict=True))
    expected = [float(drawn_majority(*case)) for case in cases]
    np.testing.assert_allclose(maj_at(correct, votes), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("correct", "votes", "value"),
    [
        ([1, 1, 0, 0, 0], [0, 0, 1, 2, 3], 1),  # two of five are the most
        ([1, 1, 0, 0, 0], [0, 0, 1, 1, 2], 1 / 2),  # a tie
        ([1, 0, 0, 0, 0], [0, NO_VOTE, NO_VOTE, NO_VOTE, NO_VOTE], 1),  # who does not vote does not count
        ([0, 0, 0, 0, 0], [NO_VOTE] * 5, 0),  # nobody votes
        ([1, 0, 1, 0, 0], [0, 0, 0, 1, 1], 2 / 3),  # equal answers, judged differently
        ([1, 0, 0, 0, 0], [7, 3, 2, 1, 0], 1 / 5),
    ],
)
def test_maj_by_hand(correct: list[int], votes: list[int], value: float) -> None:
    assert maj_at([correct], [votes])[0] == pytest.approx(value, abs=1e-15)


def test_resampled_means_are_those_of_all_resamples() -> None:
    """Five problems have 5^5 equally likely resamples; shares of each mean agree to five standard errors."""
    values = np.array([0.0, 0.25, 0.25, 0.75, 1.0])
    exact = Counter(float(np.mean(some)) for some in product(values, repeat=5))
    found = Counter(resampled_means(values, resamples=200_000).round(12))
    assert set(found) <= {round(mean, 12) for mean in exact}
    for mean, times in exact.items():
        share = times / 5**5
        error = math.sqrt(share * (1 - share) / 200_000)
        assert found[round(mean, 12)] / 200_000 == pytest.approx(share, abs=5 * error), mean


@pytest.mark.parametrize(("right", "problems"), [(3, 30), (15, 30), (27, 30), (80, 1319)])
def test_the_interval_of_shares_is_the_binomial_one(right: int, problems: int) -> None:
    """Of values 0 and 1 a resample's sum is binomial; ends are within one problem of its exact percentiles."""
    low, high = interval(resampled_means(np.arange(problems) < right))
    p = Fraction(right, problems)
    chances = [float(math.comb(problems, c) * p**c * (1 - p) ** (problems - c)) for c in range(2 * right + 40) if c <= problems]
    cumulative = np.cumsum(chances)
    exact = [int(np.searchsorted(cumulative, level)) / problems for level in (0.025, 0.975)]
    assert (low, high) == pytest.approx(exact, abs=1.01 / problems)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """200 draws of 60 problems from a known population: 95 % intervals hold its mean in 190 of them, to 4 standard errors."""
    generator = np.random.default_rng(3)
    chances = generator.beta(1, 2, size=(200, 60))  # mean 1/3
    values = generator.binomial(8, chances) / 8
    ends = np.array([interval(resampled_means(row, seed=i, resamples=2000)) for i, row in enumerate(values)])
    covered = ((ends[:, 0] <= 1 / 3) & (ends[:, 1] >= 1 / 3)).sum()
    assert 178 <= covered < 200


def test_the_bootstrap_is_the_same_for_one_seed_and_any_order_of_problems() -> None:
    values = np.random.default_rng(0).integers(0, 9, 500) / 8
    first = resampled_means(values, seed=4)
    np.testing.assert_array_equal(first, resampled_means(values[::-1], seed=4))
    assert not np.array_equal(first, resampled_means(values, seed=5))
    assert first.shape == (10_000,)


def test_many_distinct_values_are_drawn_in_parts() -> None:
    """2000 distinct values, 500 resamples at a time: mean and spread are those of the exact resampling distribution."""
    values = np.random.default_rng(1).random(2000)
    means = resampled_means(values)
    error = values.std() / math.sqrt(2000)
    assert means.mean() == pytest.approx(values.mean(), abs=5 * error / 100)
    assert means.std() == pytest.approx(error, rel=0.05)


def test_equal_problems_have_an_interval_without_width() -> None:
    assert interval(resampled_means([0.25] * 30)) == (0.25, 0.25)
    assert interval(resampled_means([1.0])) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: avg_at([]), "table of problems and samples"),
        (lambda: avg_at([[]]), "table of problems and samples"),
        (lambda: avg_at([[0, 2]]), "true or false"),
        (lambda: pass_at([[True, False]], 0), "k from 1 to 2, got 0"),
        (lambda: pass_at([[True, False]], 3), "k from 1 to 2, got 3"),
        (lambda: maj_at([[True, False]], [[0]]), r"shape \(1, 2\) of correct, got \(1, 1\)"),
        (lambda: resampled_means([]), "one finite value per problem"),
        (lambda: resampled_means([math.nan]), "one finite value per problem"),
        (lambda: interval(np.zeros(3), 1.0), r"must be in \(0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
