"""What a rule is given and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from cppo_lightning.errors import ConfigError


@dataclass(frozen=True)
class Seen:
    """A run as its rules see it.  All metrics are over all ranks.

    Args:
        step: optimizer steps before the update, or the rollout, that the newest metrics are of.
        latest: the newest value of every metric that was not NaN.
        first: the run's first such value of each metric that a rule watches, also if the run was resumed.
        setting: the value of a YAML key such as ``data.sampling.max_tokens``, or of another attribute of what is there; None
            where the run has none.
    """

    step: int
    latest: Mapping[str, float]
    first: Mapping[str, float]
    setting: Callable[[str], Any]

    def scaled(self, key: str, factor: float) -> str:
        """``key: value`` with the run's value times ``factor``, and what it is now; words where that is unknown."""
        now = self.setting(key)
        if isinstance(now, bool) or not isinstance(now, int | float):
            return f"a {'larger' if factor > 1 else 'smaller'} `{key}`"
        value = round(now * factor) if isinstance(now, int) else now * factor
        return f"`{key}: {value:.6g}` (now {now:.6g})"

    def gentler(self) -> str:
        """Advice to move less on each rollout."""
        rate, updates = self.latest.get("train/learning_rate"), self.setting("data.plan.updates")
        value = "`" if rate is None else f": {rate / 2:.2g}` (now {rate:.2g})"
        advice = f"a smaller learning rate, `model.optimizer.init_args.lr{value}"
        if isinstance(updates, int) and updates > 1:
            fewer = 1 if updates % 2 else updates // 2  # which the prompts divide into, as they do into the present ones
            advice += f", or fewer steps on each rollout, `data.plan.updates: {fewer}` (now {updates})"
        return advice


@dataclass(frozen=True)
class Explanation:
    """Three short texts, in which only backticks are markup."""

    saw: str  # numbers, with their metrics' tags
    means: str
    advice: str  # YAML keys with values


class Rule(ABC):
    """One thing worth saying, and when.  Children are frozen dataclasses whose fields are thresholds."""

    watches: ClassVar[tuple[str, ...]]
    """Tags of metrics that are logged together; whenever they are, and none is NaN, the rule is asked."""

    @abstractmethod
    def __call__(self, seen: Seen) -> Explanation | None:
        """What to say, or None; ``seen.latest`` has every tag that the rule watches, all of one update or rollout."""

    def check_shares(self) -> None:
        """Raise :class:`ConfigError` unless every field is in (0, 1]."""
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            if not 0 < (value := getattr(self, field.name)) <= 1:
                usual = f"usual: {field.default}"
                raise ConfigError(f"{type(self).__name__}.{field.name} must be above 0 and at most 1 ({usual}), got {value}")
