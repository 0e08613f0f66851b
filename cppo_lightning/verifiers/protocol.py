"""What a verifier pool, its supervisor and the workers say to each other.

Downwards go pickles, upwards only JSON, since nobody must unpickle what comes from a process that handles what a model wrote::

    pool -> supervisor      Setup, then numbered items (``number_item``)
    supervisor -> pool      {"ready": true} or {"error": text}; then {"item": number, "verdict": {...}}, {"pids": [...]},
                            and last of all, if need be, {"fatal": text}
    supervisor -> worker    batches: lists of pickled items
    worker -> supervisor    {"began": true} to each batch, then one verdict per item, in order
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cppo_lightning.verifiers.base import Outcome, Problem, Verdict

MAX_TEXT = 4000  # characters of each text in a verdict that goes back
MAX_PARTS = 32  # rewards that a sum may be made of
MAX_NAME = 200  # characters of each one's name
MAX_REPLY = 1 << 20  # bytes of a message upwards
LOAD_SECONDS = 120  # to import a verifier's libraries from a cold disk
OUT_OF_MEMORY = 86  # exit status of a worker that has reached its memory limit

_NUMBER = struct.Struct(">Q")


@dataclass(frozen=True)
class Setup:
    """First message to a supervisor."""

    verifier: bytes  # pickled; unpickled after sys.path is set
    sys_path: list[str]
    parent: int  # process id
    workers: int
    deadline: float  # seconds per item
    memory_mb: int  # address space of a worker, MiB


@dataclass(frozen=True)
class Item:
    """One thing to do, sent as a pickle of its own, so that one that cannot be read spoils no other."""

    problem: Problem
    response: str | None  # None: run ``Verifier.check``


def number_item(number: int, payload: bytes) -> bytes:
    """A pickled item with the number under which its verdict comes back."""
    return _NUMBER.pack(number) + payload


def split_number(message: bytes) -> tuple[int, bytes]:
    """The inverse of ``number_item``."""
    return _NUMBER.unpack_from(message)[0], message[_NUMBER.size :]


def encode_verdict(verdict: Verdict) -> bytes:
    """Raises ``TypeError`` or ``ValueError`` for anything but a verdict with finite rewards and at most ``MAX_PARTS`` parts."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the verifier returned {type(verdict).__name__} instead of a Verdict")
    message = {
        "outcome": Outcome(verdict.outcome).value,
        "reward": _finite(verdict.reward),
        "extracted": None if verdict.extracted is None else str(verdict.extracted)[:MAX_TEXT],
        "detail": str(verdict.detail)[:MAX_TEXT],
        "parts": _parts(verdict.parts),
    }
    return json.dumps(message).encode()


def decode_verdict(message: Any) -> Verdict:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` if the message is not one of :func:`encode_verdict`."""
    extracted = message["extracted"]
    if not (extracted is None or isinstance(extracted, str)):
        raise ValueError(f"not a verdict: {str(message)[:200]}")
    return Verdict(
        Outcome(message["outcome"]), _finite(message["reward"]), extracted, str(message["detail"]), _parts(message["parts"])
    )


def _finite(reward: Any) -> float:
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"the verifier returned the reward {value}")
    return value


def _parts(parts: Any) -> dict[str, float]:
    if not isinstance(parts, Mapping) or len(parts) > MAX_PARTS or any(len(str(name)) > MAX_NAME for name in parts):
        raise ValueError(
            f"the verifier returned the parts {str(parts)[:200]}, which must be at most {MAX_PARTS} rewards, under names of at "
            f"most {MAX_NAME} characters"
        )
    return {str(name): _finite(part) for name, part in parts.items()}
