"""The pool against answers that are made to break it, and against someone who kills its workers."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise

import pytest

from cppo_lightning.verifiers import MathAnswer, Outcome, Verdict, VerifierPool
from tests.hostile import Pair, good_pairs, mixed, right_and_wrong

DEADLINE = 1.0
HANG = 60.0  # seconds; only a defect takes as long


@pytest.mark.slow
def test_hostile_answers_neither_stop_nor_grow_nor_fool_the_trainer() -> None:
    """500 of them among 500 good ones: every verdict is there, no good one is lost, and no hostile one is CORRECT.

    Two pools of one worker each, so that the time between two verdicts of a pool is the time that an answer took, which
    benchmarks/verifier_pool.py measures on a quiet machine.
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
    wrongly = [(p, v) for p, v, g in zip(pairs, verdicts, good, strict=True) if (v.outcome is Outcome.CORRECT) != g]
    assert_late_by_a_stall_alone(wrongly)
    assert max(longest(times) for _, times in watched) < HANG
    assert grown < 50 << (10 if sys.platform == "linux" else 20)
    assert {Outcome.UNPARSEABLE, Outcome.WRONG, Outcome.TIMED_OUT} <= set(Counter(v.outcome for v in verdicts))


def assert_late_by_a_stall_alone(wrongly: list[tuple[Pair, Verdict]]) -> None:
    """A machine that stalls for a second makes the good answers of that second late; with more time they are CORRECT."""
    assert [(pair[0].id, v) for pair, v in wrongly if v.outcome is not Outcome.TIMED_OUT] == []
    assert len(wrongly) <= 5
    with VerifierPool(MathAnswer(), deadline=HANG) as pool:
        again = pool.judge([pair for pair, _ in wrongly])
    assert {verdict.outcome for verdict in again} <= {Outcome.CORRECT}


def watch(pool: VerifierPool, pairs: list[Pair]):
    """The futures of the pairs, and a list that begins with now and gets the time at which each is done."""
    times = [time.monotonic()]
    futures = [pool.submit(problem, response) for problem, response in pairs]
    for future in futures:
        future.add_done_callback(lambda _: times.append(time.monotonic()))
    return futures, times


def longest(times: list[float]) -> float:
    return max(later - earlier for earlier, later in pairwise(sorted(times)))


KILLS = 150


@pytest.mark.slow
def test_a_storm_of_kills_loses_doubles_and_changes_nothing() -> None:
    """A random worker after every 20 verdicts, under a load of integers and formulas.

    By verdicts, since a slow machine may judge none between kills at fixed times, as benchmarks/verifier_pool.py has them.
    """
    judged, calls, killed, draw = 0, Counter[str](), set[int](), random.Random(0)

    def came(name: str) -> None:
        calls.update([name])
        if calls.total() % 20 == 0 and pool.pids:
            with suppress(ProcessLookupError):  # gone since the pool told of it
                os.kill(pid := draw.choice(pool.pids), signal.SIGKILL)
                killed.add(pid)

    with VerifierPool(MathAnswer(), workers=2, deadline=HANG, max_pending=512) as pool:
        pool.judge(right_and_wrong(0, 8)[0])
        while len(killed) < KILLS:
            pairs, expected = right_and_wrong(judged, 200)
            futures = [pool.submit(problem, response) for problem, response in pairs]
            for (problem, _), future in zip(pairs, futures, strict=True):
                future.add_done_callback(lambda _, name=problem.id: came(name))
            assert [future.result(HANG).outcome for future in futures] == expected
            judged += len(pairs)
    assert set(calls.values()) == {1}
    assert len(calls) == judged
