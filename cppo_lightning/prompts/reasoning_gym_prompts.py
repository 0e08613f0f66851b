"""Problems that reasoning-gym makes up."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRows
from cppo_lightning.prompts.holdout import Split, check_split, in_split
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.verifiers.base import Problem
from cppo_lightning.verifiers.reasoning_gym import library, refuse_evaluating


@dataclass(frozen=True)
class ReasoningGymPrompts(PromptSource):
    """Distinct questions of one reasoning-gym task.

    Whether a question is held out depends on its text alone, so that "train" and "heldout" never share one, whatever their
    sizes and seeds.

    Args:
        name: the task, for example ``basic_arithmetic``.
        size: questions to draw, before repeated ones are dropped and the others are held back.
        seed: of the drawing.
        params: the task's own settings, for example ``{max_digits: 1}``.
        heldout_share: share of all possible questions that belong to "heldout", from 0 to below 1.
        split: which part to load.
        limit: keep only the first so many.
    """

    name: str
    size: int = 1000
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    heldout_share: float = 0.0
    split: Split = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"ReasoningGymPrompts.size must be at least 1, got {self.size}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"ReasoningGymPrompts.limit must be at least 1 or null, got {self.limit}")
        check_split(type(self).__name__, self.split, self.heldout_share)
        if fixed := {"size", "seed"} & set(self.params):
            raise ConfigError(f"ReasoningGymPrompts.params must not contain {sorted(fixed)}: set {sorted(fixed)} beside it")
        refuse_evaluating(self.name)

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        """The questions in the order in which they were first drawn; only those of the split are counted as rows."""
        drawn = self._draw()
        own = [entry for entry in drawn if in_split(entry["question"], self.split, self.heldout_share)]
        entries: dict[str, Mapping[str, Any]] = {}
        for entry in own:
            entries.setdefault(entry["question"], entry)
        if not entries:
            raise ConfigError(
                f"ReasoningGymPrompts: none of the {len({entry['question'] for entry in drawn})} distinct questions of "
                f"{self.name!r} is in the split {self.split!r} at heldout_share {self.heldout_share}; "
                "draw more (size) or change the share"
            )
        if bad_rows is not None:
            bad_rows.rows += len(own)
            bad_rows.repeated += len(own) - len(entries)
        return [self._problem(entry) for entry in list(entries.values())[: self.limit]]

    def _draw(self) -> list[dict[str, Any]]:
        reasoning_gym = library()
        tasks = reasoning_gym.factory.DATASETS
        if self.name not in tasks:
            near = difflib.get_close_matches(self.name, tasks, n=3) or sorted(tasks)[:3]
            raise ConfigError(f"ReasoningGymPrompts.name: reasoning-gym has no task {self.name!r}; near: {', '.join(near)}")
        try:
            return list(reasoning_gym.create_dataset(self.name, size=self.size, seed=self.seed, **self.params))
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"ReasoningGymPrompts.params {self.params} do not suit {self.name!r}: {error}") from error

    def _problem(self, entry: Mapping[str, Any]) -> Problem:
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()[:12]
        answer = entry["answer"]
        return Problem(
            id=f"{self.name}-{digest}",
            messages=({"role": "user", "content": entry["question"]},),
            answer="" if answer is None else str(answer),
            source=f"reasoning-gym {self.name}",
            metadata={"task": self.name, "entry": dict(entry)},
        )
