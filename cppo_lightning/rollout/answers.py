"""Every answer of an evaluation, of all ranks: scored once, and kept in one parquet file per set.

``<folder>/<set>/step=N.parquet`` has a row for each response, ordered by problem and sample:

============ ================================= =====================================================================
column       type                              meaning
============ ================================= =====================================================================
set          string                            name of the set
number       int32                             place of the problem in the set, from 0
sample       int32                             number of the response to this problem, from 0
id           string                            the problem's id
prompt       list of struct of role, content   what was asked, as chat turns
response     string                            the answer in full, without special tokens
answer       string                            the gold answer
extracted    string, nullable                  the answer as the verifier read it; null if it read none
outcome      string                            correct, wrong, unparseable, timed_out or failed
reward       float64                           the verifier's reward
tokens       int32                             length of the response
finished     bool                              false if ``max_tokens`` cut it off
step         int64                             optimizer steps that the sampling weights had seen
============ ================================= =====================================================================

``step=N.json`` beside it has the set's scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo_lightning.errors import RolloutError
from cppo_lightning.ranks import from_rank_zero, on_rank_zero
from cppo_lightning.rollout.scores import Row, Scores, SetScores, score
from cppo_lightning.untrusted import whole_file

if TYPE_CHECKING:
    import pyarrow


def conclude(rows: Sequence[Row], samples: int, step: int, folder: Path) -> Scores:
    """Scores of all ranks' rows, on every rank; rank 0 keeps the rows.  Every rank must call it, also one without rows.

    Args:
        rows: this rank's, ``samples`` to each problem.
        samples: responses to each problem.
        step: optimizer steps that the weights had seen.
        folder: gets a folder per set.

    Raises:
        RolloutError: no rank has a row, or the files cannot be written.
    """
    parts = on_rank_zero(rows)
    return from_rank_zero(partial(_conclude, parts, samples, step, folder))


def _conclude(parts: list[Sequence[Row]] | None, samples: int, step: int, folder: Path) -> Scores:
    assert parts is not None, "this runs on rank 0"
    sets: dict[str, list[Row]] = {}
    for row in chain.from_iterable(parts):
        sets.setdefault(row["set"], []).append(row)
    if not sets:
        raise RolloutError("the evaluation has sampled nothing; it needs at least one batch of problems")
    for rows in sets.values():
        rows.sort(key=lambda row: (row["number"], row["sample"]))
    scores = score(sets, samples)
    for name, rows in sets.items():
        _keep(folder / name, step, rows, scores.sets[name])
    return scores


def _keep(folder: Path, step: int, rows: Sequence[Row], scores: SetScores) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([_encodable(row) for row in rows], _schema())
    try:
        with whole_file(folder / f"step={step}.parquet") as file:
            parquet.write_table(table, file)
        with whole_file(folder / f"step={step}.json") as file:
            file.write((json.dumps({"step": step, **asdict(scores)}, indent=1) + "\n").encode())
    except OSError as error:
        raise RolloutError(f"the answers of an evaluation cannot be kept in {folder}: {error}") from error


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    text, turn = pa.string(), pa.struct({"role": pa.string(), "content": pa.string()})
    return pa.schema(
        {
            "set": text,
            "number": pa.int32(),
            "sample": pa.int32(),
            "id": text,
            "prompt": pa.list_(turn),
            "response": text,
            "answer": text,
            "extracted": text,
            "outcome": text,
            "reward": pa.float64(),
            "tokens": pa.int32(),
            "finished": pa.bool_(),
            "step": pa.int64(),
        }
    )


def _encodable(value: Any) -> Any:
    """Lone surrogates, which JSON lets a data set have and UTF-8 does not, become question marks."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value
