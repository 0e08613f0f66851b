"""CPPO's policy-improvement bound (arXiv 2606.10968, Sec. 2-3, App. B), exact by enumerating every response.

Shapes: V tokens, T positions, V^T responses; ``...`` is a batch of policy pairs, usually empty.  A prefix or response is a row
number: its tokens read as digits in base V, the first token most significant.  ``[..., T]`` has a value per position t = 1..T.

Units: rewards, J, L', Delta, bounds and penalties are in units of the reward; divergences D, u, l, c, delta, delta_b and slack
are total variation, a probability in [0, 1]; weights have no unit.  Everything is float64.
"""

from cppo_lightning.theory.bounds import (
    cppo_penalty,
    implemented_penalty,
    prefix_penalty,
    residual_bound,
    slack_penalty,
    suffix_linear,
    suffix_product,
    suffix_sum,
    terminal_penalty,
    theorem_penalty,
    uniform_penalty,
)
from cppo_lightning.theory.improvement import ImprovementBound, improvement_bound
from cppo_lightning.theory.tabular import (
    TabularPolicy,
    expected_reward,
    hardest_rewards,
    max_divergence,
    mean_divergence,
    residual,
    surrogate,
    total_variation,
)

__all__ = [
    "ImprovementBound",
    "TabularPolicy",
    "cppo_penalty",
    "expected_reward",
    "hardest_rewards",
    "implemented_penalty",
    "improvement_bound",
    "max_divergence",
    "mean_divergence",
    "prefix_penalty",
    "residual",
    "residual_bound",
    "slack_penalty",
    "suffix_linear",
    "suffix_product",
    "suffix_sum",
    "surrogate",
    "terminal_penalty",
    "theorem_penalty",
    "total_variation",
    "uniform_penalty",
]
