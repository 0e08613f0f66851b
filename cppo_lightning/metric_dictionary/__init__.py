"""What every tag in TensorBoard means: unit, healthy range, x-axis, and who logs it; ``docs/metrics.md`` is made from it.

A test holds code and dictionary to each other.  A user's own callback may log what it likes.
"""

from cppo_lightning.metric_dictionary.entries import NONE_KNOWN, Kind, Metric, Panel, Section, XAxis, ends
from cppo_lightning.metric_dictionary.evaluation import EVALUATION
from cppo_lightning.metric_dictionary.numerics import NUMERICS
from cppo_lightning.metric_dictionary.optimization import TRAINING
from cppo_lightning.metric_dictionary.outcomes import DATA, ROLLOUTS
from cppo_lightning.metric_dictionary.pictures import PICTURES
from cppo_lightning.metric_dictionary.trust_region import BUDGET, MASK, MOVEMENT

SECTIONS: tuple[Section, ...] = (EVALUATION, ROLLOUTS, TRAINING, MASK, BUDGET, MOVEMENT, NUMERICS, PICTURES, DATA)


def metrics() -> list[tuple[Panel, Metric]]:
    """Every entry with the panel it is in, in the order of the layout."""
    return [(panel, metric) for section in SECTIONS for panel in section.panels for metric in panel.metrics]


def find(tag: str) -> Metric | None:
    """The entry of a tag as logged, such as ``eval/aime24/avg@16``; None for one that the dictionary does not have."""
    return next((metric for _, metric in metrics() if metric.matches(tag)), None)


__all__ = ["NONE_KNOWN", "SECTIONS", "Kind", "Metric", "Panel", "Section", "XAxis", "ends", "find", "metrics"]
