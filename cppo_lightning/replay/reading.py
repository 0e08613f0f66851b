"""The files of a recording, which may come from anywhere: read as numbers and text, and checked before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cppo_lightning.batch import Gate, RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.mismatch import RecomputedBatch
from cppo_lightning.replay.layout import BY_TOKEN, LISTS, OLD, SCHEMA, TOP_K, Place, Recorded

if TYPE_CHECKING:
    from torch import Tensor

_VALUES_PER_BYTE, _VALUES = 256, 2**26  # that a row group may claim, for each byte of the file, or in all
_PADDED_PER_TOKEN, _PADDED = 64, 2**20  # padded tokens that a micro-batch may have, for each token in it, or in all


def read(path: Path) -> Iterator[Recorded]:
    """The micro-batches of one file, in their order; one at a time is in memory.

    Raises:
        ConfigError: it is not such a file, not a whole one, or its rows do not go together.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_file(file, path)
            for i in range(file.num_row_groups):
                rows = file.read_row_group(i, use_threads=False)
                rows.validate(full=True)
                yield _micro_batch({name: rows[name].combine_chunks() for name in SCHEMA.names}, path)
    except (pa.ArrowException, OSError) as error:
        raise _refused(path, f"cannot be read ({str(error).partition(chr(10))[0]})") from error


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"recording: {str(path)!r} {reason}; take a file as RolloutRecorder has written it")


def _check_file(file: pq.ParquetFile, path: Path) -> None:
    given = file.schema_arrow
    if not given.equals(SCHEMA):
        wrong = [f.name for f in SCHEMA if f.name not in given.names or given.field(f.name).type != f.type]
        wrong += sorted(set(given.names) - set(SCHEMA.names))
        raise _refused(path, f"has other columns than a recording{f', by {wrong[0]!r} for one' if wrong else ''}")
    held, size = file.metadata, path.stat().st_size
    for group in map(held.row_group, range(held.num_row_groups)):
        values = sum(group.column(i).num_values for i in range(group.num_columns))
        if not group.num_rows or values > max(_VALUES, _VALUES_PER_BYTE * size):
            raise _refused(path, f"claims a row group of {group.num_rows} rows and {values} values in {size} bytes")


def _micro_batch(columns: Mapping[str, Any], path: Path) -> Recorded:
    lengths, top_k = _check_lists(columns, path)
    same = {name: columns[name].unique().to_pylist() for name in (*Place._fields, "width")}
    count, width, tokens = len(lengths), same["width"][0], int(lengths.sum())
    if any(len(values) > 1 for values in same.values()) or columns["row"].to_pylist() != list(range(count)):
        raise _refused(path, f"has a micro-batch {same['micro_batch'][0]} that is not whole or not in order")
    if not lengths.max() <= width <= max(_PADDED, _PADDED_PER_TOKEN * tokens) // count:
        raise _refused(path, f"has {count} rows of {width} padded tokens for {tokens} tokens")
    prompts = _list_lengths(columns["prompt_ids"])
    if count * int(prompts.max()) > max(_PADDED, _PADDED_PER_TOKEN * int(prompts.sum())):
        raise _refused(path, f"has {count} prompts of up to {prompts.max()} tokens for {prompts.sum()} tokens")

    def by_token(name: str) -> Any:
        trailing = (top_k,) if name in TOP_K else ()
        return None if columns[name].null_count else _padded(columns[name], inside, *trailing)

    def by_row(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor(columns[name].to_pylist(), dtype=dtype)

    inside = np.arange(width) < lengths[:, None]
    prompt_mask = np.arange(prompts.max()) >= prompts.max() - prompts[:, None]
    fields: dict[str, Any] = {
        "prompt_ids": _padded(columns["prompt_ids"], prompt_mask),
        "prompt_mask": torch.from_numpy(prompt_mask),
        "response_mask": by_token("mask"),
        "advantages": by_row("advantage", torch.float32),
        "rewards": by_row("reward", torch.float32),
        **{name: by_row(name, torch.int64) for name in ("group", "policy_version", "sample")},
        **{name: by_token(name) for name in ("response_ids", "rollout_logp", "topk_ids", "topk_rollout_logp")},
    }
    old_logp = by_token("old_logp")
    return Recorded(
        Place(*(same[name][0] for name in Place._fields)),
        RolloutBatch(**fields) if old_logp is None else RecomputedBatch(**fields, old_logp=old_logp),
        logp=by_token("logp"),
        topk_logp=by_token("topk_logp"),
        gate=Gate(by_token("weight"), by_token("keep")),
        problems=columns["problem"].to_pylist(),
    )


def _check_lists(columns: Mapping[str, Any], path: Path) -> tuple[np.ndarray, int]:
    """Tokens of each response ``[B]`` and K, which all lists go with."""
    for name, column in columns.items():
        _check_values(name, column, path)
    lengths = _list_lengths(columns["response_ids"])
    top_k = int(_list_lengths(columns["topk_ids"])[0] // max(lengths[0], 1))
    there = {name: not columns[name].null_count for name in columns}
    if lengths.min() < 1 or {there[name] for name in TOP_K} != {top_k > 0}:
        raise _refused(path, "has a response without tokens, or a part of the top-K entries")
    factors = dict.fromkeys((*BY_TOKEN, *OLD), 1) | dict.fromkeys(TOP_K, top_k)
    for name, factor in factors.items():
        if there[name] and (_list_lengths(columns[name]) != factor * lengths).any():
            raise _refused(path, f"has lists in column {name!r} that do not go with the response's tokens")
    if not columns["mask"].flatten().to_numpy(zero_copy_only=False)[lengths.cumsum() - 1].all():
        raise _refused(path, "has a response that does not end with a trainable token")
    return lengths, top_k


def _check_values(name: str, column: Any, path: Path) -> None:
    """Nothing is missing, but for whole columns of what not every run has; ids are at least 0."""
    optional = name in TOP_K or name in OLD
    values = column.flatten() if name in LISTS else column
    if column.null_count not in ((0, len(column)) if optional else (0,)) or (values.null_count and values is not column):
        raise _refused(path, f"lacks values in column {name!r}")
    if name in LISTS and pa.types.is_integer(LISTS[name]) and len(values) and values.to_numpy().min() < 0:
        raise _refused(path, f"has a negative id in column {name!r}")


def _list_lengths(column: Any) -> np.ndarray:
    return np.diff(column.offsets.to_numpy()).astype(np.int64)


def _padded(column: Any, inside: np.ndarray, *trailing: int) -> Tensor:
    """Lists as a tensor ``[B, T]`` or ``[B, T, K]``, in the places of ``inside`` ``[B, T]``, and 0 elsewhere."""
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy()).view(-1, *trailing)
    values = values.long() if values.dtype == torch.int32 else values
    out = values.new_zeros(*inside.shape, *trailing)
    out[torch.from_numpy(inside)] = values
    return out
