"""Several sources of problems as one, drawn by weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRows
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.verifiers.base import Problem


@dataclass(frozen=True)
class Mixture(PromptSource):
    """The problems of several sources, each under the name of its set.

    A problem's ``dataset`` is that name, and its id becomes ``<name>/<id>``.

    Args:
        sources: a source for each set, by a name without ``/``.
        weights: how often each set is drawn, in any unit: ``{easy: 3, hard: 1}`` draws three easy problems to one hard one,
            however many there are of either.  Null draws every problem once per pass: sets in proportion to their sizes.

    Raises:
        ConfigError: no sources or a mixture among them, names that cannot be used, or weights that are not positive numbers for
            exactly these sets.
    """

    sources: dict[str, PromptSource]
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.sources or any(not name or "/" in name for name in self.sources):
            raise ConfigError(f"Mixture.sources must name at least one set, without '/', got {list(self.sources)}")
        if nested := [name for name, source in self.sources.items() if isinstance(source, Mixture)]:
            raise ConfigError(f"Mixture.sources: {nested} are mixtures themselves; name their sources here instead")
        if self.weights is None:
            return
        if set(self.weights) != set(self.sources):
            raise ConfigError(f"Mixture.weights must name the sets {sorted(self.sources)}, names {sorted(self.weights)}")
        for name, weight in self.weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(
                    f"Mixture.weights: {name!r} must be above 0, got {weight}; leave out a set that is not wanted"
                )

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        """The problems of every set, one set after the other.

        Raises:
            ConfigError: a source that cannot be loaded or has no problems.
        """
        problems: list[Problem] = []
        counts = BadRows() if bad_rows is None else bad_rows
        for name, source in self.sources.items():
            part = BadRows(counts.skip)
            loaded = source.load(part)
            if not loaded:
                raise ConfigError(f"Mixture.sources: {name!r} has no problems")
            counts.merge(part)
            problems += [replace(problem, id=f"{name}/{problem.id}", dataset=name) for problem in loaded]
        return problems

    def shares(self) -> dict[str, float] | None:
        return self.weights
