"""What engine and trainer disagree on at equal weights, and how much of the trust region that alone uses up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cppo_lightning.callbacks.logprob_gap import (
    GAP_MAX,
    GAP_MEAN,
    PROB_MAX,
    PROB_MEAN,
    FirstUpdateMetrics,
    gap_maxima,
    gap_totals,
)
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import Totals, bin_names, masked_max, masked_total, position_totals

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, TokenStats

NAMES = (
    *("k3", "chi2", "ess", "sequence_chi2", "sequence_ess", "captured_mass", "masked"),
    *("divergence_mean", "threshold_spent_mean", "budget_spent_mean", "budget_rate"),
)
MEANS = (GAP_MEAN, PROB_MEAN, *(f"mismatch/{name}" for name in NAMES))
MAXIMA = (GAP_MAX, PROB_MAX, *(f"mismatch/{name}_max" for name in ("divergence", "threshold_spent", "budget_spent")))
_MOST = 30.0  # nats of a log-ratio: its square's exponential is still a float32, and numerics come nowhere near it


class Mismatch(FirstUpdateMetrics):
    """Engine against trainer at each rollout's first update, where both have the same weights: all of it is numerics.

    Over sampled tokens y ~ mu with r = pi(y) / mu(y), logged as ``mismatch/...`` over all ranks:

    - ``logp_gap_mean``, ``logp_gap_max``: |log r| in nats; ``logp_gap_at/00-10`` and so on by relative position.
    - ``prob_gap_mean``, ``prob_gap_max``: |pi(y) - mu(y)|.
    - ``k3``: mean of r - 1 - log r, which estimates KL(mu || pi) per token, in nats (Schulman 2020).
    - ``chi2``: mean of (r - 1)^2, which estimates chi^2(pi || mu) = E_mu[r^2] - 1, since E_mu[r] = 1.
    - ``ess``: 1 / (1 + chi2), the share of the tokens that as many drawn from pi itself would be worth (Kong 1992).  Kish's
      (sum r)^2 / (n sum r^2) would call ratios that are all 1/2 perfect.
    - ``sequence_chi2``, ``sequence_ess``: the same with a whole response's ratio, the product over its tokens.
    - ``captured_mass``: mean probability under mu of the top-K tokens that the trust region reads.

    And the run's own trust region on that batch, as far as it has such limits (``divergence`` in its own unit):

    - ``divergence_mean``, ``divergence_max``: D_t; the mean is what ``CPPO.noise`` may be set to.
    - ``threshold_spent_mean``, ``threshold_spent_max``: D_t / (delta / w_t), the share of a token's threshold.
    - ``budget_spent_mean``, ``budget_spent_max``: S_T / (delta + delta_b W_{T-1}), the share of a response's prefix budget.
    - ``budget_rate``: mean of D_t / delta_b, the share of what each token adds to the budget: what ``budget_spent`` tends to
      in long responses.
    - ``masked``: share of tokens that were dropped.

    Rollouts from weights that are older than the policy at their first update are left out: learning would count as numerics.
    With ``data.plan.max_staleness`` 1 these are all but a run's first, and what numerics do later is only seen by
    :class:`WeightSyncCanary`, which draws its texts after a sync.

    Args:
        bins: number of equal slices of a response's own length for ``logp_gap_at``.

    Raises:
        ConfigError: ``bins`` below 1 or above 100.
    """

    def __init__(self, bins: int = 10) -> None:
        if not 1 <= bins <= 100:
            raise ConfigError(f"Mismatch.bins must be from 1 to 100 (usual: 10), got {bins}")
        super().__init__([*MEANS, *(f"mismatch/logp_gap_at/{name}" for name in bin_names(bins))], MAXIMA)
        self.bins = bins
        self._delta: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: notes the token threshold, which gates do not carry."""
        self._delta = getattr(getattr(pl_module, "trust_region", None), "token_threshold", None)

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return mismatch_totals(stats, gate, self._delta, self.bins)

    def maxima(self, stats: TokenStats, gate: Gate) -> Mapping[str, Tensor]:
        return mismatch_maxima(stats, gate, self._delta)


def mismatch_totals(stats: TokenStats, gate: Gate, delta: float | None, bins: int) -> Totals:
    """Sums and counts of everything that :class:`Mismatch` takes means of; ``delta`` is the token threshold, if any."""
    mask, found = stats.mask, gate.diagnostics
    log_ratio = (stats.logp - stats.rollout_logp).masked_fill(~mask, 0.0).clamp(-_MOST, _MOST)
    excess = log_ratio.expm1()  # r - 1, exact where it is small, which 1 + log r would lose
    real = mask.any(-1)  # ranks with less work get rows without tokens
    of_response = log_ratio.sum(-1).clamp(-_MOST, _MOST).expm1()
    totals = {
        **gap_totals(stats),
        **position_totals("mismatch/logp_gap_at", log_ratio.abs(), mask, bins),
        "mismatch/k3": masked_total((excess - log_ratio).clamp(min=0), mask),
        **_chi_squared("mismatch/", excess, mask),
        **_chi_squared("mismatch/sequence_", of_response, real),
        "mismatch/masked": masked_total(mask & ~gate.keep, mask),
    }
    if "captured_mass" in found:
        totals["mismatch/captured_mass"] = masked_total(found["captured_mass"], mask)
    if "divergence" in found:
        totals["mismatch/divergence_mean"] = masked_total(found["divergence"], mask)
    if (spent := _threshold_spent(gate, delta)) is not None:
        totals["mismatch/threshold_spent_mean"] = masked_total(spent, mask)
    if "budget_spent" in found:
        totals["mismatch/budget_spent_mean"] = masked_total(found["budget_spent"], real)
    if found.keys() >= {"divergence", "delta_b"}:
        adds = found["delta_b"][:, None].expand_as(mask)
        totals["mismatch/budget_rate"] = masked_total(found["divergence"] / adds, mask & (adds > 0))
    return totals


def mismatch_maxima(stats: TokenStats, gate: Gate, delta: float | None) -> dict[str, Tensor]:
    """Everything that :class:`Mismatch` takes maxima of."""
    maxima = gap_maxima(stats)
    if "divergence" in gate.diagnostics:
        maxima["mismatch/divergence_max"] = masked_max(gate.diagnostics["divergence"], stats.mask)
    if (spent := _threshold_spent(gate, delta)) is not None:
        maxima["mismatch/threshold_spent_max"] = masked_max(spent, stats.mask)
    if "budget_spent" in gate.diagnostics:
        maxima["mismatch/budget_spent_max"] = masked_max(gate.diagnostics["budget_spent"], stats.mask.any(-1))
    return maxima


def _chi_squared(tag: str, excess: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """chi2 and, as count / (count + sum), ess, so that both are exact over ranks."""
    total, count = masked_total(excess.square(), mask)
    return {f"{tag}chi2": (total, count), f"{tag}ess": (count, count + total)}


def _threshold_spent(gate: Gate, delta: float | None) -> Tensor | None:
    """D_t over its threshold ``[B, T]``; None where no token has one: a ``rejected`` response was judged as a whole."""
    weighted = gate.diagnostics.get("weighted_divergence", gate.diagnostics.get("divergence"))
    return None if weighted is None or delta is None or "rejected" in gate.diagnostics else weighted / delta
