"""A study's results: one parquet with a row for each rollout of each run, the same bytes however often it was interrupted.

Row r of a run is about rollout r, counted from 0: what its sampling weights were worth, and what training on it did.  The last
row is of the weights that training ended with, and has ``eval/accuracy`` alone.  A run has a file of its own while others are
still under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.comparison.grid import Run
from cppo_lightning.errors import ConfigError
from cppo_lightning.figures.numbers import Numbers
from cppo_lightning.metrics import bin_names
from cppo_lightning.untrusted import whole_file

BINS = 8  # slices of a response's own length
FINISHED = "finished"
ACCURACY, EVALUATION, STEPS = "rollout/accuracy", "eval/accuracy", "train/steps"
AT, BUDGET_AT = "mask/rate_at", "mask/by_budget_at"
TAGS = (
    EVALUATION,  # of held-out problems, before the rollout is trained on
    ACCURACY,  # of its responses
    STEPS,  # optimizer steps taken on it
    "train/entropy",
    "train/grad_norm",  # before it is clipped
    "divergence/binary_tv",  # mean |pi - mu| of its tokens, whatever the trust region looks at
    "mask/rate",
    "mask/toward",
    "mask/by_position",
    "mask/by_budget",
    *(f"{AT}/{name}" for name in bin_names(BINS)),
    *(f"{BUDGET_AT}/{name}" for name in bin_names(BINS)),
    "budget/exhausted_share",
    "budget/spent_mean",
    "budget/delta_b",
    "budget/first_exhausted",
    "budget/threshold",
)
_TOLD = ("status", "initial_weights", "first_rollout")  # the last two are digests, by which runs are seen to be paired
_OF_RUN = pa.schema([(name, pa.string()) for name in _TOLD] + [("rollout", pa.int32())] + [(tag, pa.float32()) for tag in TAGS])
_LABELS = pa.schema(
    {
        "task": pa.string(),
        "method": pa.string(),
        "learning_rate": pa.float64(),
        "reuse": pa.int32(),
        "seed": pa.int32(),
        "made_of": pa.string(),  # a digest of all settings
    }
)


@dataclass(frozen=True)
class Result:
    """One run, R rollouts.  NaN stands for what was not measured."""

    run: Run
    status: str  # FINISHED, or why the run failed
    initial_weights: str  # a digest
    first_rollout: str  # a digest of its prompts and responses
    curves: Mapping[str, Numbers]  # tag -> [R + 1]; the last one is after training

    @property
    def evaluations(self) -> Numbers:
        """Accuracy on held-out problems, first to last."""
        curve = self.curves[EVALUATION]
        return curve[np.isfinite(curve)]


def write_run(file: Path, told: Mapping[str, str], rows: Mapping[int, Mapping[str, float]]) -> None:
    """One run's rows by rollout, to a file that has its name only when it is whole."""
    table = pa.Table.from_pylist(
        [{**dict.fromkeys(_TOLD, ""), **told, "rollout": rollout, **rows[rollout]} for rollout in sorted(rows)], _OF_RUN
    )
    _write(table, file)


def ending(file: Path) -> tuple[str, float | None]:
    """Of one run's own file: its status, and its last evaluation; None if it failed."""
    there = pq.read_table(file, columns=["status", EVALUATION], use_threads=False)
    status, evaluations = there["status"][0].as_py(), there[EVALUATION].drop_null()
    return status, evaluations[-1].as_py() if status == FINISHED and len(evaluations) else None


@dataclass(frozen=True)
class Part:
    """One run's rows in a table of results.

    Args:
        made_of: a digest of all that the run is made of.
        rows: as :func:`write_run` writes them.
    """

    run: Run
    made_of: str
    rows: pa.Table

    @classmethod
    def load(cls, run: Run, made_of: str, file: Path) -> Part:
        """From one run's own file."""
        return cls(run, made_of, pq.read_table(file, schema=_OF_RUN))

    def save(self, file: Path) -> None:
        """To one run's own file."""
        _write(self.rows, file)

    def labelled(self) -> pa.Table:
        """With what tells it from other runs."""
        labels = {**self.run._asdict(), "made_of": self.made_of}
        columns = {label.name: pa.repeat(pa.scalar(labels[label.name], label.type), len(self.rows)) for label in _LABELS}
        return pa.table({**columns, **{name: self.rows[name] for name in self.rows.column_names}})


def assemble(parts: Sequence[Part], to: Path) -> None:
    """All runs' rows in the order given."""
    _write(pa.concat_tables([part.labelled() for part in parts]).combine_chunks(), to)


def taken_apart(file: Path) -> Iterator[Part]:
    """The runs of an assembled file, in its order.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"results {str(file)!r} cannot be read ({' '.join(str(error).split())})") from error
    if table.schema != pa.schema([*_LABELS, *_OF_RUN]):
        raise ConfigError(f"{str(file)!r} holds something else than results; take a results.parquet that a sweep has made")
    rows, start = table.select(_OF_RUN.names), 0
    for (*run, made_of), own in groupby(zip(*(table[name].to_pylist() for name in _LABELS.names), strict=True)):
        yield Part(Run._make(run), made_of, rows.slice(start, length := len(list(own))))
        start += length


def read(file: Path) -> list[Result]:
    """The results of an assembled file, in its order.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    return [_result(part) for part in taken_apart(file)]


def _result(part: Part) -> Result:
    told = {name: part.rows[name][0].as_py() for name in _TOLD}
    curves = {tag: part.rows[tag].to_numpy().astype(np.float64) for tag in TAGS}
    return Result(part.run, **told, curves=curves)


def difference(ours: Result, theirs: Result) -> str | None:
    """Where two results of one run first differ, in words; None if they are equal in every number."""
    for name in ("initial_weights", "first_rollout"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"began with other {name.replace('_', ' ')}"
    a, b = (np.stack([result.curves[tag] for tag in TAGS]) for result in (ours, theirs))  # [tags, R + 1]
    rollouts = min(a.shape[1], b.shape[1])
    a_there, b_there = a[:, :rollouts], b[:, :rollouts]
    unlike = (a_there != b_there) & ~(np.isnan(a_there) & np.isnan(b_there))
    if unlike.any():
        rollout = int(np.flatnonzero(unlike.any(0))[0])
        tag = int(np.flatnonzero(unlike[:, rollout])[0])
        return f"from rollout {rollout + 1} on: {TAGS[tag]} is {a[tag, rollout]:.9g}, not {b[tag, rollout]:.9g}"
    if a.shape != b.shape or ours.status != theirs.status:
        return f"{a.shape[1] - 1} rollouts ({ours.status}), not {b.shape[1] - 1} ({theirs.status})"
    return None


def _write(table: pa.Table, file: Path) -> None:
    with whole_file(file) as whole:
        pq.write_table(table, whole, compression="zstd")
