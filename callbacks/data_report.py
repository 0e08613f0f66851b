"""What a run trains and is evaluated on, in a table at its start."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cppo_lightning.callbacks.reporting import printable, rollout_data
from cppo_lightning.metrics import log_metrics
from cppo_lightning.rollout.problem_sets import overlaps_in_words

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.rollout.problem_sets import ProblemSet, ProblemSets

COLUMNS = ("set", "rows", "repeated", "conflicting", "bad", "too long", "kept", "fingerprint")


class DataReport(Callback):
    """Prints and logs, on rank zero, what became of the rows of each set and which evaluation problems are trained on.

    TensorBoard gets the same as the text ``data/report`` and, of the training set, ``data/problems`` (those trained on) and
    ``data/repeated``, ``data/conflicting``, ``data/bad`` and ``data/too_long`` (those left out); ``data/contaminated`` is the
    number of evaluation problems that match one of the training set.  All matches are written to ``contamination.json`` in the
    logger's folder.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first rollout, when every callback has had its sets read."""
        sets = rollout_data(trainer, type(self).__name__).sets
        folder = trainer.log_dir if trainer.loggers else None  # every rank must ask
        if not trainer.is_global_zero or sets.training is None:
            return
        rows = [_row(loaded) for loaded in (sets.training, *sets.evaluations.values())]
        notes = _notes(sets.training, list(sets.evaluations.values()))
        _print(rows, notes)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("data/report", _markdown(rows, notes), trainer.global_step)
        log_metrics(trainer, _scalars(sets, sets.training))
        found = {s.name: [asdict(overlap) for overlap in s.overlaps] for s in sets.evaluations.values() if s.overlaps}
        if found and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "contamination.json").write_text(json.dumps(found, indent=1) + "\n")


def _notes(training: ProblemSet, evaluations: Sequence[ProblemSet]) -> list[str]:
    """What the table has no column for: the sets of a mixture, why rows are bad, which problems match."""
    members = Counter(problem.dataset for problem in training.problems if problem.dataset)
    notes = [f"{training.name}: {', '.join(f'{number} of {name}' for name, number in members.items())}"] if members else []
    notes += [f"{loaded.name}, bad: {loaded.bad}" for loaded in (training, *evaluations) if loaded.bad]
    notes += [f"{loaded.name}: {overlaps_in_words(loaded)}" for loaded in evaluations]
    return [printable(note) for note in notes]  # ids and names of files are whatever the data say


def _row(loaded: ProblemSet) -> list[str]:
    counts = loaded.counts
    numbers = (counts.rows, counts.repeated, counts.conflicting, counts.bad, loaded.too_long, len(loaded.problems))
    return [loaded.name, *map(str, numbers), loaded.fingerprint]


def _scalars(sets: ProblemSets, training: ProblemSet) -> dict[str, float]:
    counts = training.counts
    matched = sum(len({overlap.evaluation for overlap in loaded.overlaps}) for loaded in sets.evaluations.values())
    numbers = {
        "problems": len(training.problems),
        "repeated": counts.repeated,
        "conflicting": counts.conflicting,
        "bad": counts.bad,
        "too_long": training.too_long,
        "contaminated": matched,
    }
    return {f"data/{name}": float(number) for name, number in numbers.items()}


def _print(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    table = Table(title="Data", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("set", "fingerprint") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(emoji=False)  # data.jsonl:100: is a file and its line
    console.print(table, markup=False, highlight=False)
    for note in notes:
        # ids and paths are to be copied from one line
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The same for TensorBoard; in an indented block no id or file name is markup."""
    lines = [" | ".join(cells) for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"    {note}" for note in notes)
