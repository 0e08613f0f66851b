"""Responses are judged while the caller does something else, and it can change its mind."""

from __future__ import annotations

import ctypes
import random
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from cppo_lightning.verifiers import Outcome, Problem, Verdict, VerifierPool
from cppo_lightning.verifiers.channel import Channel
from tests.moody import Moody

PROBLEM = Problem("p", (), "5")
LIBC = ctypes.PyDLL(None)  # whose calls keep the interpreter


def test_verdicts_come_while_the_caller_is_elsewhere() -> None:
    """Nobody calls ``result``, and the calling thread holds the interpreter for itself between two looks."""
    with VerifierPool(Moody(), workers=2) as pool:
        futures = [pool.submit(PROBLEM, str(number)) for number in range(300)]
        end = time.monotonic() + 60
        while not all(future.done() for future in futures) and time.monotonic() < end:
            hold_the_interpreter(0.05)
        assert all(future.done() for future in futures)
        assert [future.result().extracted for future in futures] == [str(number) for number in range(300)]


def test_the_deadline_holds_while_the_caller_keeps_the_interpreter(tmp_path: Path) -> None:
    note, switching = tmp_path / "pid", sys.getswitchinterval()
    with VerifierPool(Moody(), workers=1, deadline=1.0) as pool:
        try:
            while True:
                pool.judge([(PROBLEM, "a")])
                (worker,), submitted = pool.pids, time.monotonic()
                future = pool.submit(PROBLEM, f"child {note}")
                while not note.exists() and not future.done():
                    time.sleep(0.01)
                sys.setswitchinterval(3600)  # no other thread runs until this one waits for something
                if LIBC.kill(worker, 0) == 0:  # on a machine that stalled it may be late for that
                    break
                sys.setswitchinterval(switching)
                note.unlink(missing_ok=True)
            while LIBC.kill(worker, 0) == 0 and time.monotonic() < submitted + 60:
                LIBC.usleep(10_000)
            taken, judged = time.monotonic() - submitted, future.done()
        finally:
            sys.setswitchinterval(switching)
        assert 1.0 <= taken < 60
        assert not judged, "the thread of the pool had its turn, so the interpreter was not kept"
        assert future.result(60) == Verdict(Outcome.TIMED_OUT, 0.0, detail="killed after 1 s")


def hold_the_interpreter(seconds: float) -> None:
    """Sleep like a long call into C that releases no lock."""
    LIBC.usleep(int(seconds * 1e6))


def test_submit_waits_when_too_much_is_pending(tmp_path: Path) -> None:
    flag, order, futures = tmp_path / "flag", [], list[Future[Verdict]]()

    def submit() -> None:
        for number in range(4):
            futures.append(pool.submit(PROBLEM, f"wait {flag}"))
            order.append(number)

    with VerifierPool(Moody(), workers=1, deadline=600, max_pending=2) as pool:
        submitter = threading.Thread(target=submit)
        submitter.start()
        while len(order) < 2:
            time.sleep(0.01)
        submitter.join(0.5)
        assert order == [0, 1]
        flag.touch()
        submitter.join(60)
        assert order == [0, 1, 2, 3]
        assert [future.result(60).outcome for future in futures] == [Outcome.CORRECT] * 4
        # What is cancelled leaves room, and so does what fails; a longer list than fits goes through.
        assert [v.extracted for v in pool.judge([(PROBLEM, str(number)) for number in range(50)])] == [*map(str, range(50))]


def test_what_is_cancelled_is_not_waited_for(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with VerifierPool(Moody(), workers=1, deadline=600, max_pending=3) as pool:
        first = pool.submit(PROBLEM, f"wait {flag}")
        dropped = [pool.submit(PROBLEM, "exit") for _ in range(2)]
        assert all(future.cancel() for future in dropped)
        last = [pool.submit(PROBLEM, number) for number in "ab"]
        flag.touch()
        assert [future.result(60).outcome for future in (first, *last)] == [Outcome.CORRECT] * 3
        assert all(future.cancelled() for future in dropped)


def test_close_cancels_what_is_pending() -> None:
    pool = VerifierPool(Moody(), workers=1, deadline=600)
    futures = [pool.submit(PROBLEM, "sleep") for _ in range(3)]
    pool.close()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(0)
    with pool:
        assert pool.submit(PROBLEM, "a").result(60).extracted == "a"


def test_several_threads_share_a_pool() -> None:
    results: dict[int, list[str | None]] = {}

    def work(number: int) -> None:
        results[number] = [v.extracted for v in pool.judge([(PROBLEM, f"{number}-{i}") for i in range(200)])]

    with VerifierPool(Moody(), workers=2, max_pending=64) as pool:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {number: [f"{number}-{i}" for i in range(200)] for number in range(4)}


def test_messages_arrive_whole() -> None:
    """Of all sizes, cut anywhere by the socket."""
    draw = random.Random(0)
    messages = [draw.randbytes(draw.choice((0, 1, 7, 8, 9, 1000, 300_000))) for _ in range(100)]
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    sender, receiver, got = Channel(left), Channel(right), list[bytes]()
    for message in messages:
        sender.send(message)
    while len(got) < len(messages):
        sender.write()
        got += receiver.read() or []
    assert got == messages
    assert not sender.wants_to_write
    sender.close()
    assert receiver.read() is None
    receiver.close()


def test_a_message_that_is_too_large_is_not_waited_for() -> None:
    left, right = socket.socketpair()
    with left, right:
        sender = Channel(left)
        sender.send(b"x" * 11)
        sender.write()
        with pytest.raises(ValueError, match="message of 11 bytes, where 10 are allowed"):
            Channel(right, largest=10).read()
