"""How all pictures look: colours, type sizes, the empty figure to draw on, and its ways out as pixels or as a file.

The background is opaque, so that a picture can be read on a light page and on a dark one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

BACKGROUND = "#f8f8f5"
PANEL = "#ffffff"
TEXT = "#1f2328"
MUTED = "#59636e"  # secondary text, 4.5 : 1 against the background and more
GRID = "#d1d9e0"

# What a trust region did with a token; docs/mask.png has the same.
KEPT = "#3b7cb8"
TOWARD = "#a9bccb"
BY_POSITION = "#e0900f"
BY_BUDGET = "#c2306b"
REJECTED = "#3f2a63"
DROPPED = "#8a5a2b"

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1f2328")  # Okabe and Ito's: curves side by side
HEAT = "magma_r"  # from pale to dark with even steps of lightness

DPI = 110
_LETTERS_PER_INCH = 11  # of a subtitle
SIZES = {"title": 12.5, "subtitle": 9.5, "label": 10.0, "tick": 9.0, "legend": 9.0}  # points


def new_figure(
    title: str,
    subtitle: str = "",
    rows: int = 1,
    heights: Sequence[float] | None = None,
    size: tuple[float, float] = (9.6, 4.4),
) -> tuple[Figure, list[Axes]]:
    """An empty figure with ``rows`` panels one above the other that share their x-axis.

    Args:
        title: what there is to see.
        subtitle: of what it was measured, smaller.
        heights: relative heights of the panels; None for equal ones.
        size: inches; at 110 dots per inch the picture is 1056 x 484 pixels.
    """
    figure = Figure(figsize=size, dpi=DPI, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr]
    panels = list(figure.subplots(rows, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes in panels:
        plain(axes)
    lines = textwrap.wrap(subtitle, int(_LETTERS_PER_INCH * size[0]))
    panels[0].set_title(title, loc="left", fontsize=SIZES["title"], color=TEXT, fontweight="bold", pad=6 + 14 * len(lines))
    if lines:
        look = {"fontsize": SIZES["subtitle"], "color": MUTED, "va": "bottom"}
        panels[0].annotate("\n".join(lines), (0, 1), (0, 6), "axes fraction", "offset points", **look)
    return figure, panels


def plain(axes: Axes) -> None:
    """The look of an empty panel."""
    axes.set_facecolor(PANEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=TEXT, labelsize=SIZES["tick"])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Names of a panel's axes, each with its unit; an empty one leaves an axis as it is."""
    if x:
        axes.set_xlabel(x, fontsize=SIZES["label"], color=TEXT)
    if y:
        axes.set_ylabel(y, fontsize=SIZES["label"], color=TEXT)


def whole(axis: Axis) -> None:
    """Ticks at whole numbers alone, written in full: optimizer steps, tokens, responses."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    written = ScalarFormatter(useOffset=False)
    written.set_scientific(False)
    axis.set_major_formatter(written)


def lone(values: NDArray[np.float64]) -> str:
    """The marker of a curve: a dot where it has one point, of which no line is to be seen, else none."""
    return "o" if len(values) == 1 else ""


def legend(figure: Figure, columns: int = 4) -> None:
    """What the colours of all panels mean, below them, where it hides nothing; a name that occurs twice is written once.

    It has fewer columns where names are too long for the figure's width.
    """
    found = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    for number in range(columns, 0, -1):
        made = figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=number,
            frameon=False,
            fontsize=SIZES["legend"],
            labelcolor=TEXT,
            handlelength=1.6,
            columnspacing=1.8,
        )
        if number == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()


def threshold_name(limit: NDArray[np.float64]) -> str:
    """What to call a threshold on D_t: delta / w_t where it moves with the position, delta where no weights move it."""
    there = limit[np.isfinite(limit)]
    return "threshold δ" if np.ptp(there) <= 1e-6 * there.max() else "threshold δ / wₜ"


def percent(axes: Axes) -> None:
    """Write a panel's y-axis, a share between 0 and 1, in per cent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def to_image(figure: Figure) -> NDArray[np.uint8]:
    """The figure's pixels ``[H, W, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def to_png(figure: Figure, path: str | Path) -> None:
    """Write the figure to a PNG file that does not name the version of matplotlib."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, facecolor=BACKGROUND, metadata={"Software": None})
