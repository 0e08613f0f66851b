"""Writes docs/metrics.md, a table of every tag that a run logs, from ``cppo_lightning.metric_dictionary``.

python docs/metrics.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from cppo_lightning.metric_dictionary import SECTIONS, Metric, Panel, XAxis

HEAD = """\
# Metrics

Everything goes to TensorBoard. Means are sums over counts across micro-batches and ranks, and shares lie between 0 and 1. The
unit "divergence" is that of the trust region's own: probability for total variation, nats for KL. In a tag, `<...>` stands
for a name; a tag with `..._low` and `..._high` has the ends of its 95 % bootstrap interval over problems beside it.

The x-axis counts optimizer steps from 0. Where a value stands on it depends on what it is of:

{axes}

What `MaskRate`, `BudgetExhaustion`, `Divergence` and `Mismatch` saw of a step that was not taken, because it was not finite,
is not logged. With `max_staleness: 1`, `mismatch/` is of a run's first rollout alone.

Healthy ranges are what the paper, the code's own limits or a measurement ([benchmarks.md](benchmarks.md)) support; "none known"
means that nobody has established one. Callback `Explain` says in words when a number leaves its range. `TensorBoardLayout`
draws the scalars by these headings, in this order, in TensorBoard's tab CUSTOM SCALARS.

`python docs/metrics.py` makes this page from `cppo_lightning/metric_dictionary`.
"""
TABLE = "| tag | unit | meaning | healthy | x-axis | logged by |\n|---|---|---|---|---|---|\n"


def page() -> str:
    """The page as Markdown."""
    axes = "\n".join(f"- **{axis.label}**: {axis.value}" for axis in XAxis)
    sections = [
        f"\n## {section.title}\n\n{TABLE}" + "".join(row(panel, metric) for panel in section.panels for metric in panel.metrics)
        for section in SECTIONS
    ]
    return HEAD.format(axes=axes) + "".join(sections)


def row(panel: Panel, metric: Metric) -> str:
    """An entry's line in its section's table."""
    tags = f"`{metric.tag}`, `..._low`, `..._high`" if metric.interval else f"`{metric.tag}`"
    unit = panel.unit if panel.kind == "scalar" else panel.kind
    logged_by = ", ".join(f"`{name}`" for name in panel.logged_by.split(", "))
    return f"| {tags} | {unit} | {metric.meaning} | {metric.healthy} | {panel.x_axis.label} | {logged_by} |\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    (folder / "metrics.md").write_text(page())
