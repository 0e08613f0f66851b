"""``run.json``: what a recording was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.untrusted import whole_file

FORMAT = 1
FOLDER, CARD, ROLLOUTS = "recording", "run.json", "rollouts"
_KINDS = {"model": str, "trust_region": dict, "anchor": str, "mismatch": dict | None, "top_k": int}  # of what replay reads


@dataclass(frozen=True)
class RunCard:
    """What a recording was made with: plain values.

    Args:
        format: of the files; this code writes and reads 1.
        versions: of the packages that numbers depend on.
        model: folder or hub id of policy and tokenizer.
        trust_region: the run's own, as ``class_path`` and ``init_args``.
        anchor: what its ratios start at, ``model.anchor``.
        mismatch: ``model.mismatch``.
        top_k: entries of mu that each token has; 0 for none.
        sampling: ``data.sampling``.
        seed: ``data.seed``.
        plan: ``data.plan``.
        ranks: that had problems of their own.
        micro_batch_tokens: ``model.micro_batch_tokens``.
        every_n_rollouts: rollouts from one that is recorded to the next.
    """

    format: int
    versions: Mapping[str, str]
    model: str
    trust_region: Mapping[str, Any]
    anchor: str
    mismatch: Mapping[str, Any] | None
    top_k: int
    sampling: Mapping[str, Any]
    seed: int
    plan: Mapping[str, Any]
    ranks: int
    micro_batch_tokens: int
    every_n_rollouts: int

    def write(self, folder: Path) -> None:
        with whole_file(folder / CARD) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())


def read_card(folder: Path) -> RunCard:
    """The ``run.json`` of a recording.

    Raises:
        ConfigError: it cannot be read, or is of another format.
    """
    path = folder / CARD
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"recording: {str(path)!r} cannot be read ({error})") from error
    given = held.get("format") if isinstance(held, dict) else None
    if given != FORMAT:
        raise ConfigError(f"recording: {str(path)!r} is of format {given}, and this version reads {FORMAT}")
    wrong = sorted({f.name for f in fields(RunCard)} - held.keys())
    wrong += [name for name, kinds in _KINDS.items() if name in held and not isinstance(held[name], kinds)]
    if wrong:
        raise ConfigError(f"recording: {str(path)!r} lacks {', '.join(wrong)}, or has something else there")
    return RunCard(**{f.name: held[f.name] for f in fields(RunCard)})


def recording_of(run: Path) -> Path:
    """The recording in a run's log folder, or ``run`` itself if it is one.

    Raises:
        ConfigError: there is none.
    """
    for folder in (run, run / FOLDER):
        if (folder / CARD).is_file():
            return folder
    raise ConfigError(
        f"RUN: {str(run)!r} holds no {FOLDER}/{CARD}; give the log folder of a run with the callback RolloutRecorder"
    )


def part_path(folder: Path, rank: int, rollout: int, update: int) -> Path:
    """The file of one update's rows on one rank."""
    return folder / ROLLOUTS / f"rank{rank}" / f"{rollout:06}-{update:03}.parquet"


def parts_of(folder: Path) -> dict[tuple[int, int], list[Path]]:
    """The files by (rollout, update) in the run's order, each a list by rank."""
    found: dict[tuple[int, int], list[tuple[int, Path]]] = {}
    for path in (folder / ROLLOUTS).glob("rank*/*-*.parquet"):
        numbers = (path.parent.name.removeprefix("rank"), *path.stem.split("-"))
        if len(numbers) == 3 and all(number.isascii() and number.isdigit() for number in numbers):
            rank, rollout, update = map(int, numbers)
            found.setdefault((rollout, update), []).append((rank, path))
    return {place: [path for _, path in sorted(found[place])] for place in sorted(found)}
