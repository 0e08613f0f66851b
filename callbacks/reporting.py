"""Where callbacks put their numbers, and what they ask of the datamodule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.tensorboard import SummaryWriter

    from cppo_lightning.engines.engine import Sampling
    from cppo_lightning.prompts import PromptSource
    from cppo_lightning.rollout.problem_sets import ProblemSets
    from cppo_lightning.rollout.sampler import Rollout, Sampler
    from cppo_lightning.rollout.stream import RolloutPlan
    from cppo_lightning.verifiers.base import Problem


class RolloutData(Protocol):
    """What these callbacks use of :class:`cppo_lightning.datamodule.RolloutDataModule`."""

    @property
    def rollout(self) -> Rollout | None: ...
    @property
    def sampler(self) -> Sampler: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def plan(self) -> RolloutPlan: ...
    @property
    def sets(self) -> ProblemSets: ...

    def sync_weights(self) -> None: ...

    def draw_seed(self, *purpose: str | int) -> int: ...

    def load(self, source: PromptSource, name: str, max_tokens: int | None = None) -> Sequence[Problem]: ...


def rollout_data(trainer: Trainer, needed_by: str) -> RolloutData:
    """The datamodule that samples.

    Raises:
        ConfigError: the trainer has none, or one that does not sample rollouts.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None or not hasattr(datamodule, "sync_weights"):
        raise ConfigError(f"{needed_by} needs a RolloutDataModule, got data={datamodule!r}; use one, or remove the callback")
    return cast(RolloutData, datamodule)


def answers_folder(trainer: Trainer) -> Path:
    """Where an evaluation keeps its answers.  Every rank must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "evaluations"


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The writers of the run's TensorBoard logs, for what is no number; they do nothing on ranks other than 0."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def accuracy_tags(metrics: Iterable[str]) -> list[str]:
    """The tags of avg@n among an evaluation's, of sets and of their mean, without the ends of intervals."""
    return [tag for tag in metrics if re.fullmatch(r"eval/(.+/)?avg@\d+", tag)]


def notify(trainer: Trainer, hook: str, *args: object) -> None:
    """Call ``hook(trainer, *args)`` on every callback that has it."""
    for callback in getattr(trainer, "callbacks", ()):
        if (observer := getattr(callback, hook, None)) is not None:
            observer(trainer, *args)


def printable(text: str) -> str:
    """``text`` on one line, with escapes in the place of what would drive a terminal or cannot be seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def over_ranks(names: Iterable[str]) -> list[str]:
    """All ranks' names, sorted: the same list on each, which sums over ranks need.  Every rank must call it."""
    if not torch.distributed.is_initialized():
        return sorted(set(names))
    gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sorted(set(names)))
    return sorted({name for given in gathered for name in given})
