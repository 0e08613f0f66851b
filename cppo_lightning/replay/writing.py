"""From gates, as a run makes them, to the files of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cppo_lightning.replay.layout import BY_TOKEN, LISTS, OLD, SCHEMA, TOP_K, Place
from cppo_lightning.untrusted import whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats
    from cppo_lightning.rollout.sampler import Rollout

# ids repeat and go into dictionaries, floats do not; the names are parquet's for what is in a list
_ENCODING: Any = {
    "compression": "zstd",
    "use_dictionary": [f"{name}.list.element" for name, kind in LISTS.items() if pa.types.is_integer(kind)],
    "use_byte_stream_split": [f"{name}.list.element" for name, kind in LISTS.items() if pa.types.is_floating(kind)],
}


def to_table(
    place: Place, stats: TokenStats, gate: Gate, old_logp: Tensor | None, sample: Tensor, rollout: Rollout
) -> pa.Table:
    """Rows of ``SCHEMA``: the responses of one micro-batch that have a trainable token, copied to the CPU.

    Args:
        place: where the micro-batch was.
        stats: what the trust region saw.
        gate: what it answered.
        old_logp: ``[B, T]`` float32, log pi_old, where the run's ratios start there.
        sample: ``[B]`` int64, each response's place in ``rollout.samples``.
        rollout: what was sampled.
    """
    trained = stats.mask.any(-1).cpu()
    mask = stats.mask.cpu()[trained]  # [R, T]
    width = mask.shape[1]
    lengths = (torch.arange(1, width + 1) * mask).amax(-1)  # up to the last trainable token: what follows is padding
    inside = torch.arange(width) < lengths[:, None]
    places = sample.cpu()[trained].tolist()
    samples = [rollout.samples[i] for i in places]
    of_row: dict[str, Any] = {name: [value] * len(samples) for name, value in place._asdict().items()}
    of_row |= {
        "row": range(len(samples)),
        "width": [width] * len(samples),
        "sample": places,
        "problem": [s.problem.id for s in samples],
        "group": [i // rollout.n for i in places],
        "policy_version": [rollout.version] * len(samples),
        "reward": [s.verdict.reward for s in samples],
        "advantage": stats.advantages.cpu()[trained, 0].tolist(),
        "prompt_ids": [s.prompt_ids for s in samples],
    }
    arrays = {name: pa.array(values, SCHEMA.field(name).type) for name, values in of_row.items()}
    found = {**vars(stats), "weight": gate.weight, "keep": gate.keep, "old_logp": old_logp}
    for name in (*BY_TOKEN, *TOP_K, *OLD):
        values = found[name]
        arrays[name] = _lists(name, None if values is None else values.cpu()[trained][inside], lengths)
    return pa.table(arrays, SCHEMA)


def _lists(name: str, values: Tensor | None, lengths: Tensor) -> pa.Array:
    """``values`` ``[N]`` or ``[N, K]``, one row's after another's, cut into rows of ``lengths`` tokens; all null for None."""
    if values is None:
        return pa.nulls(len(lengths), SCHEMA.field(name).type)
    ends = lengths.cumsum(0).numpy() * (values.shape[1] if values.dim() > 1 else 1)
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.flatten().numpy()).cast(LISTS[name]))


def write(micro_batches: Sequence[pa.Table], path: Path) -> None:
    """One file, which appears when it is whole, a row group for each micro-batch.  Floats stay what they are bit for bit."""
    with whole_file(path) as file, pq.ParquetWriter(file, SCHEMA, **_ENCODING) as writer:
        for table in micro_batches:
            writer.write_table(table)
