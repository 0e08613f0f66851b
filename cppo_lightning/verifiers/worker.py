"""What a worker process of a ``VerifierPool`` does: judge one item after the other."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time

from cppo_lightning.verifiers import memory
from cppo_lightning.verifiers.base import Outcome, Verdict, Verifier
from cppo_lightning.verifiers.channel import Channel
from cppo_lightning.verifiers.protocol import MAX_TEXT, OUT_OF_MEMORY, Item, Setup, encode_verdict

_GRACE = 5.0  # seconds past the deadline after which a worker ends itself, should nobody have done so
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, wanted: bool = True) -> None:
    """On Linux, have this process killed as soon as ``parent`` has gone; ``wanted`` False takes this back.

    The kernel ties this to the thread that started the process, and forgets it at a fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0)
        if os.getppid() != parent:  # it went before it was asked for
            os._exit(1)


def serve(channel: Channel, verifier: Verifier, setup: Setup) -> None:
    """Answer batches until the other side goes.  ``channel`` blocks."""
    memory.limit(setup.memory_mb)
    memory.watch()
    if sys.platform != "linux":
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def reply(message: bytes) -> None:
        channel.send(message)
        channel.write()

    for batch in channel.messages():
        reply(b'{"began": true}')
        for payload in pickle.loads(batch):
            # The kernel's alarm ends even an interpreter stuck in one long multiplication.
            signal.setitimer(signal.ITIMER_REAL, setup.deadline + _GRACE)
            verdict = _judge(verifier, payload)
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(verdict)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _judge(verifier: Verifier, payload: bytes) -> bytes:
    try:
        item: Item = pickle.loads(payload)
        if item.response is None:
            verifier.check(item.problem)
            verdict = Verdict(Outcome.CORRECT, 0.0)
        else:
            verdict = verifier(item.problem, item.response)
        encoded = encode_verdict(verdict)
        trusted = verdict.outcome is Outcome.CORRECT
    except (MemoryError, memory.MemoryLimitReached):
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        encoded, trusted = encode_verdict(Verdict(Outcome.FAILED, 0.0, detail=describe(error))), False
    # "Not equal" may be what became of a failed allocation, and what this process has cached since may be no better.
    if memory.reached() and not trusted:
        os._exit(OUT_OF_MEMORY)
    return encoded


def describe(error: Exception) -> str:
    """The error's type and message in one short line."""
    return f"{type(error).__name__}: {error}"[:MAX_TEXT].removesuffix(": ")
