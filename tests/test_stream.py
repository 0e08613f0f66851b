"""Collating, skipping, cutting and the order of prompts, with hand-made samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cppo_lightning.advantages import GroupRelative
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.mismatch import RecomputedBatch
from cppo_lightning.prompts.prompt_order import PromptOrder
from cppo_lightning.rollout.collate import collate
from cppo_lightning.rollout.dealing import dealt
from cppo_lightning.rollout.sampler import Rollout, Sample
from cppo_lightning.rollout.stream import RolloutPlan, RolloutStream, refilled
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict
from cppo_lightning.verifiers.overlong import Overlong


def make_sample(problem: int, reward: float, length: int, k: int = 2) -> Sample:
    ids = torch.arange(1, length + 1) + 10 * problem
    topk_ids = ids[:, None] + torch.arange(k)
    completion = Completion(ids, -ids.float() / 100, True, topk_ids, -topk_ids.float() / 100)
    verdict = Verdict(Outcome.CORRECT if reward else Outcome.WRONG, reward)
    return Sample(Problem(str(problem), (), ""), list(range(1, problem + 2)), completion, "", verdict)


def make_rollout(rewards: list[list[float]], version: int = 5) -> Rollout:
    samples = [make_sample(p, r, 1 + (p + j) % 4) for p, row in enumerate(rewards) for j, r in enumerate(row)]
    return Rollout(samples, len(rewards[0]), version, 0.0, 0.0)


def test_collate_pads_prompts_left_and_responses_right() -> None:
    rollout = make_rollout([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    batch = collate(rollout.samples, [0.5, -0.5] * 3, [0, 1, 2, 3, 8, 9], n=2, version=5, top_k=2, pad_id=99)
    assert batch.prompt_ids.tolist()[::2] == [[99, 99, 1], [99, 1, 2], [1, 2, 3]]
    assert batch.prompt_mask.tolist()[::2] == [[False, False, True], [False, True, True], [True, True, True]]
    for row, sample in enumerate(rollout.samples):
        n = len(sample.completion.ids)
        assert batch.response_ids[row].tolist() == sample.completion.ids.tolist() + [99] * (4 - n)
        assert batch.response_mask[row].tolist() == [True] * n + [False] * (4 - n)
        assert torch.equal(batch.rollout_logp[row, :n], sample.completion.logp)
        assert batch.topk_ids is not None
        assert sample.completion.topk_ids is not None
        assert torch.equal(batch.topk_ids[row, :n], sample.completion.topk_ids)
    assert batch.policy_version.tolist() == [5] * 6
    assert batch.sample is not None
    assert (batch.sample.tolist(), batch.group.tolist()) == ([0, 1, 2, 3, 8, 9], [0, 0, 1, 1, 4, 4])


def test_groups_without_spread_are_skipped_and_the_rest_dealt_evenly() -> None:
    rollout = make_rollout([[1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [1, 0], [1, 1], [0, 1]])
    stream = RolloutStream(lambda: rollout, GroupRelative(), updates=2, top_k=0, pad_id=0)
    batches = list(stream)
    assert len(batches) == len(stream) == 2
    assert [b.group.tolist() for b in batches] == [[1, 1, 4, 4, 5, 5], [3, 3, 7, 7]]
    for batch in batches:
        assert batch.sample is not None
        assert torch.equal(batch.response_ids[:, 0], torch.stack([rollout.samples[i].completion.ids[0] for i in batch.sample]))
    # two rewards 0 and 1: mean 1/2, unbiased std 1/sqrt(2)
    torch.testing.assert_close(batches[0].advantages, torch.tensor([-1, 1, -1, 1, 1, -1]) * 0.5**0.5, rtol=1e-5, atol=0)
    assert batches[0].topk_ids is None


@pytest.mark.parametrize(("groups", "updates"), [(64, 8), (61, 4), (3, 5), (0, 2)])
def test_updates_get_as_many_groups_and_about_as_many_tokens(groups: int, updates: int) -> None:
    responses = torch.randn(groups, 8, generator=torch.Generator().manual_seed(groups)).exp()
    lengths = (100 * responses.sum(-1)).int().tolist()
    shares = dealt(dict(enumerate(lengths)), updates)
    assert sorted(group for share in shares for group in share) == list(range(groups))
    assert [len(share) for share in shares] == [groups // updates + (u < groups % updates) for u in range(updates)]
    if groups > updates:
        in_turn = [share.tolist() for share in torch.arange(groups).tensor_split(updates)]
        most, most_in_turn = (max(sum(lengths[g] for g in share) for share in way) for way in (shares, in_turn))
        mean = sum(lengths) / updates
        assert most - mean < 0.5 * (most_in_turn - mean)


def test_no_update_has_the_long_groups_every_time() -> None:
    generator, found = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(800):
        lengths = torch.randn(16, generator=generator).exp().mul(100).int().tolist()
        longest = lengths.index(max(lengths))
        found[[longest in share for share in dealt(dict(enumerate(lengths)), 4)].index(True)] += 1
    # 200 each: more than 265 or fewer than 135 is over five standard deviations, sqrt(800 * 1/4 * 3/4)
    assert float((found - 200).abs().max()) < 65


def test_too_few_groups_leave_empty_minibatches() -> None:
    rollout = make_rollout([[1, 1], [0, 1], [0, 0], [1, 1]])
    batches = list(RolloutStream(lambda: rollout, GroupRelative(), updates=2, top_k=2, pad_id=0))
    assert [len(b) for b in batches] == [2, 0]
    assert int(batches[1].num_tokens) == 0
    assert batches[1].topk_ids is not None
    assert batches[1].topk_ids.shape == (0, 0, 2)


def test_long_responses_lose_reward_before_the_advantages_are_computed() -> None:
    """Lengths are 1, 2, 3 | 2, 3, 4 | 3, 4, 1; from 2 tokens on each costs half a reward, from 4 on all of it."""
    rollout = make_rollout([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    stream = RolloutStream(lambda: rollout, GroupRelative(normalize_std=False), 1, 0, 0, Overlong(4, 2))
    (batch,) = stream
    assert batch.response_mask.sum(-1).tolist() == [1, 2, 3, 3, 4, 1]
    shaped = torch.tensor([[1.0, 0.0, 0.5], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(batch.advantages, (shaped - shaped.mean(-1, keepdim=True)).flatten(), rtol=1e-6, atol=1e-7)
    # the group that is all wrong is skipped, although its lengths give it a spread; the batch reports the verifier's rewards
    assert batch.group.tolist() == [0, 0, 0, 2, 2, 2]
    assert batch.rewards.tolist() == [1, 0, 1, 1, 1, 0]


def test_every_minibatch_is_recomputed_before_the_first_is_yielded() -> None:
    seen: list[list[int]] = []

    def recompute(batch: RolloutBatch) -> RecomputedBatch:
        seen.append(batch.group.tolist())
        return RecomputedBatch(**vars(batch), old_logp=batch.rollout_logp - 1 * batch.response_mask)

    rollout = make_rollout([[0, 1], [1, 0], [0, 1], [1, 1]])
    stream = iter(RolloutStream(lambda: rollout, GroupRelative(), updates=4, top_k=0, pad_id=0, recompute=recompute))
    first = next(stream)
    assert first.group.tolist() == [0, 0]
    assert isinstance(first, RecomputedBatch)
    torch.testing.assert_close(first.old_logp, first.rollout_logp - 1 * first.response_mask, rtol=0, atol=0)
    # empty minibatches too: on other ranks they may not be empty, and all take part in collectives
    assert seen == [[0, 0], [1, 1], [2, 2], []]
    rest = list(stream)
    assert [len(batch) for batch in rest] == [2, 2, 0]
    assert all(isinstance(batch, RecomputedBatch) for batch in rest)


def test_passes_go_through_the_same_minibatches_again() -> None:
    seen: list[list[int]] = []

    def recompute(batch: RolloutBatch) -> RecomputedBatch:
        seen.append(batch.group.tolist())
        return RecomputedBatch(**vars(batch), old_logp=batch.rollout_logp)

    rollout = make_rollout([[0, 1], [1, 0], [0, 1], [1, 1]])
    stream = RolloutStream(lambda: rollout, GroupRelative(), 3, top_k=0, pad_id=0, recompute=recompute, passes=2)
    batches = list(stream)
    assert len(batches) == len(stream) == RolloutPlan(3, 2, updates=3, passes=2).steps == 6
    assert [batch.group.tolist() for batch in batches] == [[0, 0], [1, 1], [2, 2]] * 2
    assert all(torch.equal(first.advantages, again.advantages) for first, again in zip(batches[:3], batches[3:], strict=True))
    assert seen == [[0, 0], [1, 1], [2, 2]], "pi_old is of the weights that sampled, for both passes"
    assert stream.hand is not None
    other = RolloutStream(lambda: rollout, GroupRelative(), 3, top_k=0, pad_id=0, passes=2)
    other.restore(replace(stream.hand, trained=4), None)
    assert [batch.group.tolist() for batch in other] == [[1, 1], [2, 2]], "where the second pass was left"
    with pytest.raises(
        ConfigError, match=r"rest of a rollout of 6 updates, and data\.plan\.updates is 3, data\.plan\.passes 1"
    ):
        RolloutStream(lambda: rollout, GroupRelative(), 3, top_k=0, pad_id=0).restore(stream.hand, None)
    with pytest.raises(ConfigError, match=r"data\.plan\.passes must be at least 1, got 0"):
        RolloutPlan(passes=0)


def test_a_rest_that_lacks_what_is_read_of_it_is_refused() -> None:
    def recompute(batch: RolloutBatch) -> RecomputedBatch:
        return RecomputedBatch(**vars(batch), old_logp=batch.rollout_logp)

    rollout = make_rollout([[0, 1], [1, 1], [1, 0]])  # with the top 2
    first = RolloutStream(lambda: rollout, GroupRelative(), 2, top_k=0, pad_id=0)
    next(iter(first))
    rest = first.hand
    assert rest is not None
    with pytest.raises(ConfigError, match=r"log-prob.* top 2 tokens, and model\.trust_region reads the top 3: .*between two"):
        RolloutStream(lambda: rollout, GroupRelative(), 2, top_k=3, pad_id=0).restore(rest, None)
    again = RolloutStream(lambda: rollout, GroupRelative(), 2, top_k=0, pad_id=0, recompute=recompute)
    with pytest.raises(
        ConfigError, match=r"was not recomputed, and model\.anchor is recomputed: go on with the anchor rollout"
    ):
        again.restore(rest, None)
    next(iter(again))
    for fitting in (again, RolloutStream(lambda: rollout, GroupRelative(), 2, top_k=2, pad_id=0)):
        fitting.restore(again.hand, None)  # the group without a spread is not recomputed, and not read
        assert [batch.group.tolist() for batch in fitting] == [[0, 0], [2, 2]]
    again.restore(replace(rest, rollout=replace(rollout, samples=[]), shares=[[], []]), None)
    assert [len(batch) for batch in again] == [0, 0]


def refill_of(spread: list[list[int]], groups: int, max_refills: int) -> tuple[list[tuple[int, int]], Rollout]:
    """Refill number i has a spread in the groups where ``spread[i]`` is 1; number 0 is the first draw."""
    asked: list[tuple[int, int]] = []

    def draw(number: int, missing: int) -> Rollout:
        asked.append((number, missing))
        return replace(make_rollout([[0, s] for s in spread[number][:missing]]), seconds_sampling=2.0, seconds_verifying=1.0)

    return asked, refilled(make_rollout([[1, 1 - s] for s in spread[0]]), groups, max_refills, draw)


def test_refills_ask_for_what_is_missing_until_nothing_is() -> None:
    asked, rollout = refill_of([[1, 0, 0, 1], [0, 1], [1], [1]], groups=4, max_refills=5)
    assert asked == [(1, 2), (2, 1)]
    rewards = [[s.verdict.reward for s in group] for group in rollout.groups()]
    assert rewards == [[1, 0], [1, 1], [1, 1], [1, 0], [0, 0], [0, 1], [0, 1]]
    assert (rollout.n, rollout.version) == (2, 5)
    assert (rollout.seconds_sampling, rollout.seconds_verifying) == (4.0, 2.0)
    batches = list(RolloutStream(lambda: rollout, GroupRelative(), updates=2, top_k=0, pad_id=0))
    assert [batch.group.tolist() for batch in batches] == [[0, 0, 3, 3], [5, 5, 6, 6]]


def test_refills_are_bounded() -> None:
    asked, rollout = refill_of([[0, 0, 1]] + [[0, 0]] * 9, groups=3, max_refills=3)
    assert asked == [(1, 2), (2, 2), (3, 2)]
    assert len(rollout.groups()) == 9
    assert refill_of([[0, 0, 0]], groups=3, max_refills=0)[0] == []
    assert refill_of([[1, 1, 1]], groups=3, max_refills=3)[0] == []


def test_prompt_order_is_fixed_by_the_seed_and_the_position() -> None:
    problems = [Problem(str(i), (), "") for i in range(10)]

    def ids(order: PromptOrder, count: int) -> list[str]:
        return [p.id for p in order.take(count)]

    first = PromptOrder(problems, seed=3)
    passes = [ids(first, 4), ids(first, 9), ids(first, 7)]
    flat = [i for part in passes for i in part]
    assert sorted(flat[:10]) == sorted(flat[10:]) == [str(i) for i in range(10)]
    assert flat[:10] != flat[10:], "every pass has an order of its own"
    resumed = PromptOrder(problems, seed=3)
    resumed.position = 4
    assert ids(resumed, 16) == flat[4:]
    assert ids(PromptOrder(problems, seed=4), 10) != flat[:10]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"prompts": 10, "samples": 4, "updates": 4},
            "prompts = 10 .* does not divide into data.plan.updates = 4.*take 8 or 12",
        ),
        ({"prompts": 2, "updates": 4}, "take 4 prompts"),
        ({"samples": 1}, "data.plan.samples must be at least 2, got 1"),
        ({"prompts": 0}, "data.plan.prompts must be at least 1, got 0"),
        ({"max_refills": -1}, "data.plan.max_refills must be at least 0, got -1"),
        ({"updates": 0}, "data.plan.updates must be at least 1, got 0"),
    ],
)
def test_impossible_batch_arithmetic_is_refused(plan: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutPlan(**plan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"temperature": -1}, "sampling.temperature"),
        ({"top_p": 0}, "sampling.top_p"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"min_p": 1}, "sampling.min_p"),
    ],
)
def test_impossible_sampling_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_an_answer_without_its_log_probabilities_is_refused() -> None:
    ids = torch.arange(3)
    with pytest.raises(RolloutError, match=r"'p7'.*3 tokens with 2 log-prob"):
        Completion(ids, torch.zeros(2), True).check("p7")
    with pytest.raises(RolloutError, match=r"'p7'.*2 top-K rows"):
        Completion(ids, torch.zeros(3), True, torch.zeros(2, 1), torch.zeros(2, 1)).check("p7")
    with pytest.raises(RolloutError, match=r"'p7'.*non-finite log-prob"):
        Completion(ids, torch.tensor([0.0, float("nan"), 0.0]), True).check("p7")
    with pytest.raises(RolloutError, match=r"'p7'.*non-finite top-K"):
        Completion(ids, torch.zeros(3), True, ids[:, None], torch.full((3, 1), -float("inf"))).check("p7")
    Completion(ids, torch.zeros(3), True).check("p7")
