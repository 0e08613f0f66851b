"""The child process of a ``VerifierPool``, run as ``python -m cppo_lightning.verifiers.worker``.

It imports nothing but the standard library, its verifier, and what that imports.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import threading
import time

from cppo_lightning.verifiers.base import Outcome, Verdict, Verifier
from cppo_lightning.verifiers.protocol import MAX_TEXT, Item, Setup, encode_verdict, read_frame

_GRACE = 5.0  # seconds past the deadline after which a worker whose parent has gone ends itself


def _judge(verifier: Verifier, payload: bytes) -> bytes:
    try:
        item: Item = pickle.loads(payload)
        if item.response is not None:
            return encode_verdict(verifier(item.problem, item.response))
        verifier.check(item.problem)
        return encode_verdict(Verdict(Outcome.CORRECT, 0.0))
    except Exception as error:
        return encode_verdict(Verdict(Outcome.FAILED, 0.0, detail=_describe(error)))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_TEXT].removesuffix(": ")


def _limit_memory(megabytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = megabytes << 20 if hard == resource.RLIM_INFINITY else min(megabytes << 20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError) as error:  # macOS refuses this limit
        print(f"verifier worker {os.getpid()}: no memory limit on this platform ({error})", file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    # The verifier gets an empty stdin, and its prints go to stderr: the two pipes belong to the protocol.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(message: bytes) -> None:
        os.write(replies, message + b"\n")

    frame = read_frame(requests)
    if frame is None:
        return
    setup: Setup = pickle.loads(frame)
    threading.Thread(target=_end_with_parent, args=(setup.parent,), daemon=True).start()
    try:
        sys.path[:] = setup.sys_path
        verifier: Verifier = pickle.loads(setup.verifier)
        verifier.prepare()
    except Exception as error:
        reply(json.dumps({"error": _describe(error)}).encode())
        return
    _limit_memory(setup.memory_mb)
    reply(b'{"ready": true}')
    while (frame := read_frame(requests)) is not None:
        reply(b'{"began": true}')
        for payload in pickle.loads(frame):
            # The kernel's alarm ends even an interpreter stuck in one long multiplication, should the parent have gone.
            signal.setitimer(signal.ITIMER_REAL, setup.deadline + _GRACE)
            verdict = _judge(verifier, payload)
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(verdict)


if __name__ == "__main__":
    main()
