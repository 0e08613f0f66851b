"""Advantages against the worked vectors, their identities, and the penalty on long responses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cppo_lightning.advantages import AdvantageEstimator, GroupRelative, LeaveOneOut, has_spread
from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.overlong import Overlong
from tests.worked import VECTORS

ESTIMATORS = [GroupRelative(), GroupRelative(normalize_std=False), LeaveOneOut()]
REWARDS = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=n, max_size=n), min_size=1, max_size=5)
)


def test_worked_vectors() -> None:
    expected = VECTORS["group_adv"]
    rewards = torch.tensor([expected["rewards"], [1.0] * 8])
    np.testing.assert_allclose(GroupRelative()(rewards)[0].numpy(), expected["adv_std"], rtol=1e-6)
    np.testing.assert_allclose(GroupRelative(normalize_std=False)(rewards)[0].numpy(), expected["adv_nostd"], rtol=1e-6)
    for estimator in ESTIMATORS:
        assert torch.equal(estimator(rewards)[1], torch.zeros(8))
    assert has_spread(rewards).tolist() == [True, False]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(REWARDS)
def test_equal_a_loop_over_responses(rows: list[list[float]]) -> None:
    rewards = torch.tensor(rows)
    expected: dict[AdvantageEstimator, list[list[float]]] = {estimator: [] for estimator in ESTIMATORS}
    for row in rows:
        mean, std = float(np.mean(row)), float(np.std(row, ddof=1))
        expected[ESTIMATORS[0]].append([(r - mean) / (std + 1e-6) for r in row])
        expected[ESTIMATORS[1]].append([r - mean for r in row])
        expected[ESTIMATORS[2]].append([r - float(np.mean(row[:i] + row[i + 1 :])) for i, r in enumerate(row)])
    for estimator, values in expected.items():
        np.testing.assert_allclose(estimator(rewards).numpy(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["grpo", "dr-grpo", "leave-one-out"])
@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=REWARDS, shift=st.floats(-3, 3), data=st.data())
def test_a_baseline_is_a_baseline(
    estimator: AdvantageEstimator, rows: list[list[float]], shift: float, data: st.DataObject
) -> None:
    """Advantages of a group sum to 0, do not see a constant added to its rewards, and go with their responses."""
    rewards = torch.tensor(rows)
    advantages = estimator(rewards)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(len(rows)), rtol=0, atol=1e-5)
    # where rewards are all equal, what is left of rounding is divided by eps
    kept = has_spread(rewards)
    torch.testing.assert_close(estimator(rewards + shift)[kept], advantages[kept], rtol=1e-4, atol=1e-5)
    order = torch.tensor(data.draw(st.permutations(range(rewards.shape[1]))))
    torch.testing.assert_close(estimator(rewards[:, order]), advantages[:, order], rtol=1e-4, atol=1e-5)


def test_a_response_without_others_teaches_nothing() -> None:
    for estimator in ESTIMATORS:
        assert estimator(torch.tensor([[1.0], [0.0]])).tolist() == [[0.0], [0.0]]


def test_overlong_worked_vector() -> None:
    lengths = [int(n) for n in VECTORS["overlong"]]
    penalty = Overlong(max_tokens=20480, buffer=4096)
    np.testing.assert_allclose([penalty(n) for n in lengths], list(VECTORS["overlong"].values()), rtol=1e-6)
    assert [penalty(1), penalty(0)] == [0.0, 0.0]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 5), st.lists(st.integers(0, 120), min_size=1, max_size=9))
def test_overlong_equals_the_three_cases(buffer: int, rest: int, factor: float, lengths: list[int]) -> None:
    longest = buffer + rest

    def slow(n: int) -> float:
        if n <= longest - buffer:
            return 0.0
        return factor * ((longest - buffer) - n) / buffer if n <= longest else -factor

    penalty = Overlong(longest, buffer, factor)
    np.testing.assert_allclose([penalty(n) for n in lengths], [slow(n) for n in lengths], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GroupRelative(eps=-1), r"GroupRelative\.eps must be at least 0, got -1"),
        (lambda: Overlong(0, 1), r"Overlong\.max_tokens must be at least 1 token, got 0"),
        (lambda: Overlong(8, 9), r"Overlong\.buffer must be between 1 and max_tokens = 8 .* got 9"),
        (lambda: Overlong(8, 0), r"Overlong\.buffer must be between 1 .* got 0"),
        (lambda: Overlong(8, 2, 0.0), r"Overlong\.factor must be above 0, got 0.0; .*overlong: null"),
    ],
)
def test_bad_settings_are_named(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
