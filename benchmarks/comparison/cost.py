"""What a study took: beside the results, which are the same bytes on any machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cppo_lightning.errors import ConfigError
from cppo_lightning.untrusted import whole_file


@dataclass(frozen=True)
class Times:
    """Of one run: seconds by the clock (None of one that was taken over), seconds of a core, and what machine that was."""

    seconds: float | None
    core_seconds: float
    machine: str

    def save(self, file: Path) -> None:
        _save(self, file)


@dataclass(frozen=True)
class Cost:
    """Of a table of results.

    Args:
        machine: of the runs; several, if they are not of one.
        cores: that shared them.
        models: seconds of a core for the initial weights, by task.
        runs: seconds of a core, by the run's name; not of those that were killed right behind their result.
    """

    machine: str
    cores: int
    models: dict[str, float]
    runs: dict[str, float]

    @property
    def core_seconds(self) -> float:
        return sum(self.models.values()) + sum(self.runs.values())

    def save(self, results: Path) -> None:
        """Beside a table of results."""
        _save(self, results.with_suffix(".json"))


def times_of(file: Path) -> Times | None:
    """Of a run that has noted them."""
    return Times(**json.loads(file.read_text())) if file.exists() else None


def cost_of(results: Path) -> Cost:
    """What stands beside a table of results.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Cost(**json.loads(results.with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(results)!r} needs the .json that `run` and `collect` write beside it ({error})") from error


def _save(value: Times | Cost, file: Path) -> None:
    with whole_file(file) as whole:
        whole.write((json.dumps(asdict(value), indent=1) + "\n").encode())
