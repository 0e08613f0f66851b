"""One short name for a set of problems, the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_lightning.prompts.templates import PromptTemplate
    from cppo_lightning.verifiers.base import Problem


def fingerprint(problems: Sequence[Problem], template: PromptTemplate, shares: Mapping[str, float] | None = None) -> str:
    """BLAKE2b of the problems in their order, the template and the sets' shares: 16 hexadecimal digits.

    Where a problem comes from (``Problem.source``) is left out, so that a file may be moved.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(_canonical([asdict(template), shares]))
    for problem in problems:
        row = [problem.id, problem.dataset, problem.messages, problem.answer, problem.metadata]
        digest.update(b"\n" + _canonical(row))
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True).encode()


def _plain(value: Any) -> Any:
    """What JSON can say of a value, without anything that differs between processes: no order of a set, no address."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    if type(value).__repr__ is object.__repr__:
        return {type(value).__qualname__: _plain(vars(value))}
    return repr(value)
