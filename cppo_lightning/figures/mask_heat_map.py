"""Where the trust region drops tokens, and how that changes over a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import PercentFormatter

from cppo_lightning.figures.style import HEAT, SIZES, TEXT, label, new_figure, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import MaskHeatMap

_ABSENT = "#aab4be"  # no token was there
_LEAST = 0.01  # upper end of the colour scale at least, lest rounding look like fire


def draw_mask_heat_map(numbers: MaskHeatMap) -> Figure:
    """Mask rate by optimizer step (x) and position in the response (y); grey where no token was."""
    figure, (axes,) = new_figure("Dropped tokens by position and step", f"{numbers.note}; grey: no token was there")
    there = ~np.isnan(numbers.rate)
    last = np.flatnonzero(there.any(0))[-1] + 1
    rate = np.ma.masked_array(numbers.rate[:, :last], mask=~there[:, :last])
    axes.set_facecolor(_ABSENT)
    axes.grid(visible=False)
    colours = mpl.colormaps[HEAT].with_extremes(bad=_ABSENT)
    mesh = axes.pcolormesh(numbers.steps, numbers.edges[: last + 1], rate.T, cmap=colours, vmin=0, vmax=max(_LEAST, rate.max()))
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, format=PercentFormatter(1))
    bar.set_label("dropped (% of the tokens there)", fontsize=SIZES["label"], color=TEXT)
    bar.ax.tick_params(colors=TEXT, labelsize=SIZES["tick"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    whole(axes.xaxis)
    whole(axes.yaxis)
    label(axes, "optimizer steps", "position t in the response (tokens)")
    return figure
