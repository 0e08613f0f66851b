"""Where responses run out of prefix budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cppo_lightning.figures.style import BY_BUDGET, label, new_figure, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import FirstExhaustion


def draw_first_exhaustion(numbers: FirstExhaustion) -> Figure:
    """Histogram of the place where the budget first ran out, over the responses in which it did."""
    ran_out = int(numbers.counts.sum())
    share = f"{ran_out} of {numbers.responses} responses ran out ({ran_out / max(1, numbers.responses):.1%})"
    figure, (axes,) = new_figure("Where the prefix budget first ran out", f"{numbers.note}; {share}")
    slices = len(numbers.counts)
    left = 100 * np.arange(slices) / slices
    axes.bar(left, numbers.counts, width=92 / slices, align="edge", color=BY_BUDGET, linewidth=0)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 10))
    whole(axes.yaxis)
    label(axes, "position in the response (% of its own length)", "responses (count)")
    return figure
