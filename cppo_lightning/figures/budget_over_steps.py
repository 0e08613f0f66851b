"""The prefix budget over a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cppo_lightning.figures.style import BY_BUDGET, KEPT, label, new_figure, percent, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cppo_lightning.figures.numbers import BudgetOverSteps


def draw_budget_over_steps(numbers: BudgetOverSteps) -> Figure:
    """Mean delta_b, and, once a token was dropped, the share of the dropped ones that the budget dropped, by optimizer step."""
    rows = 2 if np.isfinite(numbers.by_budget).any() else 1
    figure, panels = new_figure("Prefix budget over the run", numbers.note, rows)
    line = {"linewidth": 1.8, "marker": "o", "markersize": 4 if len(numbers.step) <= 60 else 0}
    panels[0].plot(numbers.step, numbers.delta_b, color=KEPT, **line)
    panels[0].set_ylim(0, 1.25 * float(np.nanmax(numbers.delta_b)) or 1)
    label(panels[0], y=f"mean δ$_b$\n({numbers.unit} per token)")
    if rows == 2:
        panels[1].plot(numbers.step, numbers.by_budget, color=BY_BUDGET, **line)
        panels[1].set_ylim(-0.03, 1.03)
        percent(panels[1])
        label(panels[1], y="dropped by the budget\n(% of dropped tokens)")
    whole(panels[-1].xaxis)
    label(panels[-1], x="optimizer steps")
    return figure
