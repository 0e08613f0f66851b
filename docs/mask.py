"""Draws docs/mask.png and docs/mask-dark.png: CPPO's own gate on one made-up response.

python docs/mask.py [FOLDER]
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.figures import style
from cppo_lightning.trust_regions import CPPO

TOKENS = 76
TRUST_REGION = CPPO(BinaryTV(), delta=0.15, delta_b=0.02, w_min=0.8, adaptive=False)
EARLY, LATE = 10, 72  # two tokens whose pi is 0.17 away from mu
BURST = range(25, 34)


@dataclass(frozen=True)
class Theme:
    """Colours for one background; the picture itself is transparent."""

    file: str
    text: str
    grid: str
    kept: str
    toward: str
    by_position: str
    by_budget: str


THEMES = (
    Theme("mask.png", style.TEXT, style.GRID, style.KEPT, style.TOWARD, style.BY_POSITION, style.BY_BUDGET),
    Theme("mask-dark.png", "#e6edf3", "#3d444d", "#5ba3e0", "#6b7f90", "#f2b04a", "#f0659a"),
)


def response() -> TokenStats:
    """One response of ``TOKENS`` tokens with advantage +1, so that only pi above mu moves away: ``[1, T]``."""
    random_state = random.Random(3)
    gaps = [random_state.expovariate(1 / 0.005) for _ in range(TOKENS)]
    away = [random_state.random() < 0.7 for _ in range(TOKENS)]
    for t in BURST:
        gaps[t] = random_state.uniform(0.06, 0.11)
        away[t] = t % 4 != 2
    for t in (EARLY, LATE):
        gaps[t], away[t] = 0.17, True
    gaps[17], away[17] = 0.09, False
    mu = torch.full((1, TOKENS), 0.5)
    pi = mu + torch.tensor([gaps]) * torch.tensor([away]).float().mul(2).sub(1)
    return TokenStats(
        response_ids=torch.zeros(1, TOKENS, dtype=torch.int64),
        logp=pi.log(),
        rollout_logp=mu.log(),
        advantages=torch.ones(1, TOKENS),
        mask=torch.ones(1, TOKENS, dtype=torch.bool),
    )


def draw(axes: Axes, stats: TokenStats, gate: Gate, theme: Theme) -> None:
    """Bars |pi - mu| by position, coloured by what the gate did, and both thresholds over them."""
    rows = {name: values[0] for name, values in gate.diagnostics.items() if values.dim() == 2}
    position = torch.arange(1, TOKENS + 1)
    weight = TRUST_REGION.position_weight(stats.mask)[0]
    toward = rows["toward"].bool()
    groups = {
        "kept": (gate.keep[0] & ~toward, theme.kept),
        "kept, moves back towards µ": (toward, theme.toward),
        "dropped: above δ / wₜ": (rows["masked_by_position"], theme.by_position),
        "dropped: prefix budget spent": (rows["masked_by_budget"], theme.by_budget),
    }
    for label, (chosen, colour) in groups.items():
        axes.bar(position[chosen], rows["divergence"][chosen], width=0.78, color=colour, label=label, linewidth=0)
    axes.plot(position, TRUST_REGION.delta / weight, color=theme.text, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.75)
    effective = (rows["threshold"] / weight).clamp(min=0)
    axes.step(position, effective, where="mid", color=theme.text, linewidth=1.6)


def annotate(axes: Axes, theme: Theme) -> None:
    """Axes with units, the thresholds' names, and what to see."""
    axes.set_xlabel("position t in the response (tokens)")
    axes.set_ylabel("|π \N{MINUS SIGN} µ| of the sampled token (probability)")
    axes.set_xlim(0, TOKENS + 1)
    axes.set_ylim(0, 0.22)
    axes.set_xticks([1, *range(10, TOKENS, 10), TOKENS])
    axes.set_yticks([0, 0.05, 0.1, 0.15, 0.2])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.annotate("δ / wₜ", (46, 0.1695), xytext=(46, 0.179), ha="center")
    axes.annotate("prefix-adjusted threshold", (64.6, 0.1065), xytext=(61.5, 0.1255), ha="right", arrowprops=_arrow(theme))
    axes.annotate("0.17, early: dropped", (EARLY + 1, 0.171), xytext=(EARLY + 1, 0.187), ha="center", arrowprops=_arrow(theme))
    axes.annotate("0.17, late: kept", (LATE + 1, 0.171), xytext=(TOKENS + 0.5, 0.205), ha="right", arrowprops=_arrow(theme))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, handlelength=0.9, columnspacing=1.6)


def _arrow(theme: Theme) -> dict[str, object]:
    return {"arrowstyle": "-", "color": theme.text, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2}


def main(folder: Path) -> None:
    stats = response()
    gate = TRUST_REGION(stats)
    for theme in THEMES:
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.text)
        with mpl.rc_context({**colours, "font.size": 10.5, "font.family": "DejaVu Sans"}):
            figure = Figure(figsize=(10, 4.1), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            draw(axes, stats, gate, theme)
            annotate(axes, theme)
            axes.patch.set_alpha(0)
            # no version of matplotlib in the file, so that the same picture is the same bytes
            figure.savefig(folder / theme.file, dpi=160, transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
