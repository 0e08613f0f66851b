"""What an entry of the dictionary consists of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

NONE_KNOWN = "none known"

Kind = Literal["scalar", "image", "text"]

# what a name in a tag may be; any other stands for a word without "/"
_NAMES = {
    "k": r"\d+",
    "i": r"\d+",
    "from": r"\d+",
    "to": r"\d+",
    "stage": "val|test",
    "outcome": "correct|wrong|unparseable|timed_out|failed",
}


class XAxis(Enum):
    """Where on TensorBoard's axis of steps a value stands.  Steps are optimizer steps, counted from 0."""

    STEP = "one value per optimizer step, at the step's own number"
    ROLLOUT = "one value per rollout, at the number of steps taken before it, which is the number of its first step"
    ROLLOUT_END = "one value per rollout, at the number of the last step taken on it"
    EVALUATION = "one value per evaluation, at the number of steps that the evaluated policy has taken"
    START = "one value at the start of a fit: at 0, or at the number of steps that its checkpoint had taken"
    ONCE = "at most one per run, where the metrics stand that it speaks of"
    COMMAND = "one value per call of the command, at 0, whatever checkpoint it is of"

    @property
    def label(self) -> str:
        """Its name in a sentence: ``rollout end``."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Metric:
    """One tag, or one family of tags.

    Args:
        tag: as TensorBoard shows it; ``<...>`` stands for a name, as in ``eval/<set>/avg@<k>``.
        meaning: what the number is.
        healthy: the range it should be in, and what to do outside; ``NONE_KNOWN`` where nobody has established one.
        interval: the ends of its interval are logged beside it, as ``<tag>_low`` and ``<tag>_high``.
    """

    tag: str
    meaning: str
    healthy: str = NONE_KNOWN
    interval: bool = False

    @property
    def pattern(self) -> str:
        """A regular expression that matches the whole of each such tag and nothing else, an end of an interval neither."""
        parts = re.split(r"<(\w+)>", self.tag)  # text and names take turns
        return "^" + "".join(f"({_NAMES.get(p, '[^/]+')})" if i % 2 else re.escape(p) for i, p in enumerate(parts)) + "$"

    def matches(self, tag: str) -> bool:
        """Whether ``tag`` is one of this family, or an end of its interval."""
        return re.match(self.pattern, _without_end(tag) if self.interval else tag) is not None


def ends(tag: str) -> tuple[str, str]:
    """The tags of the ends of an interval around ``tag``."""
    return f"{tag}_low", f"{tag}_high"


def _without_end(tag: str) -> str:
    return tag.removesuffix("_low").removesuffix("_high")


@dataclass(frozen=True)
class Panel:
    """Tags with one unit, drawn in one chart.

    Args:
        title: of the chart.
        unit: of its y-axis.
        x_axis: where its values stand.
        logged_by: the callback, or ``RLVRModule``.
        metrics: its entries.
        kind: where TensorBoard shows them; only scalars are in the layout.
    """

    title: str
    unit: str
    x_axis: XAxis
    logged_by: str
    metrics: tuple[Metric, ...]
    kind: Kind = "scalar"


@dataclass(frozen=True)
class Section:
    """Panels that are read together, under one heading of the layout and of the page."""

    title: str
    panels: tuple[Panel, ...]
