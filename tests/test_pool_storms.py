"""The pool against answers that are made to break it, and against someone who kills its workers."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest

from cppo_lightning.verifiers import MathAnswer, Outcome, Verdict, VerifierPool
from tests.hostile import Pair, good_pairs, kill_storm, mixed, right_and_wrong

DEADLINE = 1.0


@pytest.mark.slow
def test_hostile_answers_neither_stop_nor_grow_nor_fool_the_trainer() -> None:
    """500 of them among 500 good ones: every verdict is there, no good one is lost, and no hostile one is CORRECT.

    Two pools of one worker each, so that the time between two verdicts of a pool is the time that an answer took.
    """
    pairs, good = mixed(500, 500)
    parts = pairs[0::2], pairs[1::2]
    pools = [VerifierPool(MathAnswer(), workers=1, deadline=DEADLINE, memory_mb=768) for _ in parts]
    for pool in pools:
        pool.judge(good_pairs(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watched = [watch(pool, part) for pool, part in zip(pools, parts, strict=True)]
    verdicts: list[Verdict] = [Verdict(Outcome.FAILED, 0.0)] * len(pairs)
    for place, (futures, _) in enumerate(watched):
        verdicts[place::2] = [future.result() for future in futures]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for pool in pools:
        pool.close()
    wrongly = [(p.id, v) for (p, _), v, g in zip(pairs, verdicts, good, strict=True) if (v.outcome is Outcome.CORRECT) != g]
    assert wrongly == []
    assert max(longest(times) for _, times in watched) < DEADLINE + 1
    assert grown < 50 << (10 if sys.platform == "linux" else 20)
    assert {Outcome.UNPARSEABLE, Outcome.WRONG, Outcome.TIMED_OUT} <= set(Counter(v.outcome for v in verdicts))


def watch(pool: VerifierPool, pairs: list[Pair]):
    """The futures of the pairs, and a list that begins with now and gets the time at which each is done."""
    times = [time.monotonic()]
    futures = [pool.submit(problem, response) for problem, response in pairs]
    for future in futures:
        future.add_done_callback(lambda _: times.append(time.monotonic()))
    return futures, times


def longest(times: list[float]) -> float:
    return max(later - earlier for earlier, later in pairwise(sorted(times)))


@pytest.mark.slow
def test_a_storm_of_kills_loses_doubles_and_changes_nothing() -> None:
    """A random worker every 50 ms for 20 s, under a load of integers and formulas."""
    judged, calls = 0, Counter[str]()
    with VerifierPool(MathAnswer(), workers=2, max_pending=512) as pool:
        pool.judge(right_and_wrong(0, 8)[0])
        with kill_storm(pool, every=0.05) as killed:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                pairs, expected = right_and_wrong(judged, 200)
                futures = [pool.submit(problem, response) for problem, response in pairs]
                for (problem, _), future in zip(pairs, futures, strict=True):
                    future.add_done_callback(lambda _, name=problem.id: calls.update([name]))
                assert [future.result(60).outcome for future in futures] == expected
                judged += len(pairs)
    assert set(calls.values()) == {1}
    assert len(calls) == judged
    assert len(set(killed)) > 50
