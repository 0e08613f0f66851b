"""The declared grid: which runs there are, in what order, and what their outcomes will be called."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from cppo_lightning.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
STUDY = Path(__file__).with_name("study.yaml")
_PRESETS = "configs/trust_region"


class Cell(NamedTuple):
    """What methods are compared within."""

    task: str
    learning_rate: float
    reuse: int

    def __str__(self) -> str:
        return f"{self.task}, learning rate {self.learning_rate:g}, reuse {self.reuse}"


class Run(NamedTuple):
    """One run of ``fit``.  ``reuse``: how often a rollout is passed through."""

    task: str
    method: str
    learning_rate: float
    reuse: int
    seed: int

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.learning_rate, self.reuse)

    @property
    def name(self) -> str:
        """One that may be a path, and no other run's."""
        return f"{self.task}/{self.method}/lr={self.learning_rate}/reuse={self.reuse}/seed={self.seed}"


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        config: of ``fit``, a path from the repository's root.
        model: what makes the initial weights, a module of this project and its arguments; ``{model}`` stands for the folder.
        core_seconds: that a run is expected to take on one core.
        rollouts: of a run; None: as many as the config says.
    """

    config: str
    model: list[str]
    core_seconds: float = 100.0
    rollouts: int | None = None


@dataclass(frozen=True)
class Method:
    """A trust region.

    Args:
        preset: a file of ``configs/trust_region``, without its ending; or any YAML file with ``model.trust_region``.
        overrides: ``init_args`` in place of the preset's.
    """

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> str:
        """The preset's path from the repository's root."""
        return self.preset if self.preset.endswith((".yaml", ".yml")) else f"{_PRESETS}/{self.preset}.yaml"


@dataclass(frozen=True)
class Block:
    """The runs of every combination of what it lists, seed by seed, so that what a stop leaves is whole for the first seeds."""

    tasks: list[str]
    methods: list[str]
    learning_rates: list[float]
    reuses: list[int]
    seeds: list[int]

    def runs(self) -> Iterable[Run]:
        combined = product(self.seeds, self.tasks, self.learning_rates, self.reuses, self.methods)
        return (Run(task, method, rate, reuse, seed) for seed, task, rate, reuse, method in combined)


@dataclass(frozen=True)
class Definitions:
    """What outcomes are called, decided before anything runs.

    Args:
        final_evaluations: a run's final accuracy is the mean of so many last evaluations; 0 for a run that failed.
        collapsed_below: a run has collapsed whose final accuracy is below this share of its first evaluation.
        stable_share: a learning rate is stable for a method if at most this share of its runs collapses at it and below.
        separation: a cell separates the methods if the final accuracies of two lie this far apart, mean over their seeds.
        seeds: that a cell which separates them should have at least; an interval over fewer is not said to exclude anything.
        reference: the method that the others are subtracted from.
    """

    final_evaluations: int
    collapsed_below: float
    stable_share: float
    separation: float
    seeds: int
    reference: str


@dataclass(frozen=True)
class Study:
    """A grid: runs are those of the blocks in turn, each once.

    Raises:
        ConfigError: a name that is not declared, an empty list, or a number out of range.
    """

    tasks: dict[str, Task]
    methods: dict[str, Method]
    definitions: Definitions
    blocks: list[Block]

    def __post_init__(self) -> None:
        _check_name("definitions.reference", self.definitions.reference, self.methods)
        if not self.definitions.final_evaluations >= 1:
            raise ConfigError(f"definitions.final_evaluations must be at least 1, got {self.definitions.final_evaluations}")
        for key in ("collapsed_below", "stable_share", "separation"):
            if not 0 <= getattr(self.definitions, key) <= 1:
                raise ConfigError(f"definitions.{key} is a share, from 0 to 1, got {getattr(self.definitions, key)}")
        for name, task in self.tasks.items():
            if task.rollouts is not None and task.rollouts < 1:
                raise ConfigError(f"tasks.{name}.rollouts must be at least 1, got {task.rollouts}")
        for i, block in enumerate(self.blocks):
            where = f"blocks[{i}]"
            for key, values in vars(block).items():
                if not values or len(set(values)) < len(values):
                    raise ConfigError(f"{where}.{key} must list something, and nothing twice, got {values}")
            for key, known in (("tasks", self.tasks), ("methods", self.methods)):
                for name in getattr(block, key):
                    _check_name(f"{where}.{key}", name, known)
            for key, least in (("learning_rates", 0.0), ("reuses", 0)):
                if wrong := [value for value in getattr(block, key) if not least < value < math.inf]:
                    raise ConfigError(f"{where}.{key} must be above 0 and finite, got {wrong[0]}")

    def runs(self) -> list[Run]:
        """Every run once, in the order of the blocks."""
        return list(dict.fromkeys(run for block in self.blocks for run in block.runs()))

    @property
    def cells(self) -> list[Cell]:
        """Every cell once: by task, in the order in which they are declared, by reuse and by learning rate."""
        tasks = list(self.tasks)
        cells = {run.cell for run in self.runs()}
        return sorted(cells, key=lambda cell: (tasks.index(cell.task), cell.reuse, cell.learning_rate))

    def chosen(self, **wanted: Collection[Any] | None) -> list[Run]:
        """The runs whose ``task``, ``method``, ``learning_rate``, ``reuse`` and ``seed`` are among the wanted ones (None: any).

        Raises:
            ConfigError: a value that no run has, or no run that has all of them.
        """
        runs = self.runs()
        for key, values in wanted.items():
            for value in values or ():
                _check_name(f"--{key.replace('_', '-')}", value, {getattr(run, key): None for run in runs})
        chosen = [run for run in runs if all(not values or getattr(run, key) in values for key, values in wanted.items())]
        if not chosen:
            asked = ", ".join(f"--{key.replace('_', '-')} {values}" for key, values in wanted.items() if values)
            raise ConfigError(f"no run of the grid has {asked or 'a block'}; take some that one of its blocks combines")
        return chosen


def _check_name(where: str, name: Any, known: Mapping[Any, Any]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), list(map(str, known)), 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: {name!r} is not one of {', '.join(map(str, known))}{meant}")


def region_settings(method: Method, where: str) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of a method's trust region, tried out.

    Raises:
        ConfigError: the preset is missing or names no trust region, or an override is not one of its class's, or out of range.
    """
    from omegaconf import OmegaConf

    from cppo_lightning.replay.regions import made_from
    from cppo_lightning.trust_regions import TrustRegion

    file = REPOSITORY / method.config
    if not file.is_file():
        shipped = sorted((REPOSITORY / _PRESETS).glob("*.yaml"))
        _check_name(f"{where}.preset", method.preset, {path.stem: None for path in shipped})
    with _reading(f"{where}.preset: {method.preset!r}"):
        preset = OmegaConf.select(OmegaConf.create({"file": OmegaConf.load(file)}), "file.model.trust_region")
    if not OmegaConf.is_dict(preset):
        raise ConfigError(
            f"{where}.preset: {method.preset!r} has no model.trust_region with a class_path; take a file such as "
            f"{_PRESETS}/cppo.yaml"
        )
    merged = OmegaConf.to_container(OmegaConf.merge(preset, {"init_args": method.overrides}))
    assert isinstance(merged, dict)
    made_from(merged, TrustRegion, where)
    return {str(key): value for key, value in merged.items()}


def load_study(file: Path = STUDY) -> Study:
    """The study that a YAML file declares, with every trust region tried out.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong; names key and value.
    """
    from omegaconf import OmegaConf

    from cppo_lightning.replay.regions import made_from

    with _reading(repr(str(file))):
        settings = OmegaConf.to_container(OmegaConf.load(file))
    study = made_from(settings, Study, file.name)
    for name, method in study.methods.items():
        region_settings(method, f"{file.name}: methods.{name}")
    for name, task in study.tasks.items():
        if not (REPOSITORY / task.config).is_file():
            raise ConfigError(f"{file.name}: tasks.{name}.config: {task.config!r} is no file in the repository")
        with _reading(f"{file.name}: tasks.{name}.config: {task.config!r}"):
            OmegaConf.load(REPOSITORY / task.config)
    return study


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """A file that is no YAML, or cannot be opened, becomes a :class:`ConfigError` of one line."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{what} cannot be read: {' '.join(str(error).split())}") from error
