"""What a verifier pool and its worker processes say to each other.

Downwards length-prefixed pickles; upwards lines of JSON, since a parent must not unpickle what comes from a process that
handles what a model wrote.  After the :class:`Setup` a worker answers ``{"ready": true}`` or ``{"error": ...}``; to each batch
(a pickled list of pickled :class:`Item`) it answers ``{"began": true}`` and then one verdict per item, in order.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from cppo_lightning.verifiers.base import Outcome, Problem, Verdict

MAX_TEXT = 4000  # characters of each text in a verdict that goes back


@dataclass(frozen=True)
class Setup:
    """First message to a worker."""

    verifier: bytes  # pickled; unpickled after sys.path is set
    sys_path: list[str]
    parent: int  # process id
    deadline: float  # seconds per item
    memory_mb: int  # address space of the worker


@dataclass(frozen=True)
class Item:
    """One thing to do, sent as a pickle of its own, so that one that cannot be read spoils no other."""

    problem: Problem
    response: str | None  # None: run ``Verifier.check``


def write_frame(payload: bytes) -> bytes:
    """``payload`` with its length before it, 8 bytes big-endian."""
    return struct.pack(">Q", len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's payload; None at the end of the stream."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack(">Q", header)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def encode_verdict(verdict: Verdict) -> bytes:
    """Raises ``TypeError`` or ``ValueError`` for anything but a verdict with a finite reward."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the verifier returned {type(verdict).__name__} instead of a Verdict")
    reward = float(verdict.reward)
    if not math.isfinite(reward):
        raise ValueError(f"the verifier returned the reward {reward}")
    extracted = None if verdict.extracted is None else str(verdict.extracted)[:MAX_TEXT]
    message = {"outcome": Outcome(verdict.outcome).value, "reward": reward, "extracted": extracted}
    return json.dumps(message | {"detail": str(verdict.detail)[:MAX_TEXT]}).encode()


def decode_verdict(message: dict[str, Any]) -> Verdict:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` if the message is not one of :func:`encode_verdict`."""
    reward, extracted = float(message["reward"]), message["extracted"]
    if not math.isfinite(reward) or not (extracted is None or isinstance(extracted, str)):
        raise ValueError(f"not a verdict: {str(message)[:200]}")
    return Verdict(Outcome(message["outcome"]), reward, extracted, str(message["detail"]))
