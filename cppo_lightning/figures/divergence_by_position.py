"""How far pi is from mu along the responses, and how far it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cppo_lightning.figures.style import BY_BUDGET, KEPT, TEXT, label, legend, new_figure, threshold_name, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import DivergenceByPosition, Numbers

_SHOWN = 1e-4  # of the highest value; what lies lower is as good as nothing and would press the rest together


def draw_divergence_by_position(numbers: DivergenceByPosition) -> Figure:
    """Mean and largest tenth of D_t by position, and delta / w_t over them, on a logarithmic scale.

    Raises:
        ValueError: no D_t above 0: there is nothing to draw.
    """
    if not (numbers.mean > 0).any():
        raise ValueError("DivergenceByPosition.mean has no value above 0, which a logarithmic scale needs")
    figure, (axes,) = new_figure(f"Divergence by position: {numbers.measure.name}", numbers.note)
    curves: dict[str, tuple[Numbers, str, Any]] = {
        "mean of the largest 10 % of tokens": (numbers.largest_tenth, BY_BUDGET, "-"),
        "mean over tokens": (numbers.mean, KEPT, "-"),
    }
    if numbers.limit is not None:
        curves[f"{threshold_name(numbers.limit)}, mean over tokens"] = (numbers.limit, TEXT, (0, (4, 3)))
    for name, (values, colour, line) in curves.items():
        above = np.where(values > 0, values, np.nan)
        axes.stairs(above, numbers.edges, baseline=None, color=colour, linewidth=1.8, linestyle=line, label=name)
    found = np.concatenate([values[values > 0] for values, *_ in curves.values()])
    axes.set_yscale("log")
    axes.set_ylim(0.8 * max(found.min(), _SHOWN * found.max()), 1.4 * found.max())
    last = np.flatnonzero(numbers.mean >= 0)[-1]
    axes.set_xlim(float(numbers.edges[0]), float(numbers.edges[last + 1]))
    whole(axes.xaxis)
    label(axes, "position t in the response (tokens)", f"Dₜ ({numbers.measure.unit})")
    legend(figure)
    return figure
