"""What a run leaves behind for ``resume-check``, and how it compares with what another one did."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.callbacks import Callback

from cppo_lightning.engines.checksums import checksums

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import RolloutBatch
    from cppo_lightning.module import RLVRModule

LOGS = "logs"  # the folder of TensorBoard's files in a run's folder
_TIMES = ("seconds", "per_second")  # in the names of metrics that no two runs have in common


class Record(Callback):
    """Notes what a run is trained on, and its weights' checksums at its end.

    Args:
        folder: gets ``RANK.jsonl``, one line per update and one when training begins and ends, and ``weights.json``.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout."""
        self._note(trainer, {"event": "began"})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update."""
        rollout = trainer.datamodule.rollout  # pyright: ignore[reportAttributeAccessIssue]
        groups = rollout.groups()
        ids = [groups[g][0].problem.id for g in dict.fromkeys(batch.group.tolist())]
        digest = hashlib.blake2b(batch.response_ids.cpu().numpy().tobytes(), digest_size=8).hexdigest()
        place = {"rollout": trainer.current_epoch, "update": batch_idx}
        self._note(trainer, {"event": "update", **place, "problems": ids, "responses": digest})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training, on every rank, since shards have to be gathered."""
        found = checksums(cast("RLVRModule", pl_module).named_weights(), torch.float32)
        if trainer.is_global_zero:
            (self.folder / "weights.json").write_text(json.dumps(found))
        self._note(trainer, {"event": "ended"})

    def _note(self, trainer: Trainer, line: Mapping[str, Any]) -> None:
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")


@dataclass(frozen=True)
class Comparison:
    """How much of what two runs did is equal.

    Args:
        what: is compared.
        equal: values that both have.
        total: values that either has.
        first: the first difference in words, empty if there is none.
    """

    what: str
    equal: int
    total: int
    first: str

    @classmethod
    def of(cls, what: str, whole: Mapping[Any, Any], killed: Mapping[Any, Any]) -> Comparison:
        """Compare values by key; keys are named in their order."""
        keys = sorted(whole.keys() | killed.keys())
        # as text, in which a number that is none equals itself
        other = [key for key in keys if repr(whole.get(key)) != repr(killed.get(key))]
        first = ""
        if other:
            name = ", ".join(map(str, other[0])) if isinstance(other[0], tuple) else other[0]
            first = f"{name}: {killed.get(other[0], 'missing')}, left alone {whole.get(other[0], 'missing')}"
        return cls(what, len(keys) - len(other), len(keys), first)


def compare(whole: Path, killed: Path) -> list[Comparison]:
    """Weights, metrics, problems and responses of the runs in two folders."""
    folders = (whole, killed)
    weights = [json.loads((folder / "weights.json").read_text()) for folder in folders]
    return [
        Comparison.of("weights", *weights),
        Comparison.of("metrics by step", *map(_metrics, folders)),
        Comparison.of("problems by update", *(_trained_on(folder, "problems") for folder in folders)),
        Comparison.of("responses by update", *(_trained_on(folder, "responses") for folder in folders)),
    ]


def updates(folder: Path) -> list[tuple[int, int]]:
    """Rollout and update, by number, of each update that rank 0 has begun, those included that it began again."""
    path = folder / "0.jsonl"
    found = _lines(path) if path.exists() else ()
    return [(line["rollout"], line["update"]) for line in found if line["event"] == "update"]


def seconds_of_updates(folder: Path) -> list[float]:
    """From the beginning of each update of a run that was left alone to that of the next, or to the end of training."""
    times = [line["time"] for line in _lines(folder / "0.jsonl") if line["event"] in ("update", "ended")]
    return [after - before for before, after in pairwise(times)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What :class:`Record` wrote; a kill may have cut a line short."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _trained_on(folder: Path, what: str) -> dict[tuple[str, int, int], Any]:
    """What each update was given the last time that it was taken."""
    return {
        (f"rank {path.stem}, rollout", line["rollout"], line["update"]): line[what]
        for path in sorted(folder.glob("*.jsonl"))
        for line in _lines(path)
        if line["event"] == "update"
    }


def _metrics(folder: Path) -> dict[tuple[int, str], float]:
    """The last value by step and name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.glob(f"{LOGS}/events.out.tfevents.*")):  # their names begin with the time
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        for tag in events.Tags()["scalars"]:
            if not any(word in tag for word in _TIMES):
                found |= {(event.step, tag): event.value for event in events.Scalars(tag)}
    return found
