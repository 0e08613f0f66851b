"""The one seam of this project: a trust region sees detached numbers and answers with a gate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_lightning.batch import Gate, TokenStats


class TrustRegion(ABC):
    """Decides where the policy may move.  Children are frozen dataclasses, one per file, chosen in YAML by ``class_path``.

    Every PPO-style objective multiplies ``A_t * grad log pi(y_t | s_t)`` by a coefficient that carries no gradient, so a
    strategy returns that coefficient (``Gate.weight``) and the decision behind it (``Gate.keep``); aggregation,
    normalisation, reference KL and metrics are the trainer's.

    Diagnostics that callbacks know: ``divergence``, ``token_weight``, ``weighted_divergence``, ``threshold``, ``toward``,
    ``masked_by_position``, ``masked_by_budget``, ``budget_allowed`` (``[B, T]``), ``delta_b``, ``budget_spent``,
    ``budget_exhausted``, ``first_exhausted``, ``rejected`` (``[B]``), ``captured_mass`` (``[B, T]``), and ``surrogate``
    (``[B, T]``), the objective's value where it is not ``weight * A``.
    """

    @property
    def top_k(self) -> int:
        """Number of top-K log-probabilities of mu that rollouts must carry; 0 for none."""
        return 0

    @property
    def recomputable(self) -> bool:
        """Whether the method may be anchored at the trainer's own log-probs of a rollout (pi_old) instead of mu.

        PPO-style clips were defined that way; trust regions on a divergence from mu lose what they bound.
        """
        return False

    @property
    def token_threshold(self) -> float | None:
        """The w_t D_t above which a token is dropped whatever else its response holds (w_t = 1 where there are no weights).

        None where there is no such limit.  For pictures; the gate is what counts.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a strategy that keeps something from step to step needs to go on: tensors and plain values, of rank 0."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""

    @abstractmethod
    def __call__(self, stats: TokenStats) -> Gate:
        """Return the gate for one micro-batch.  Rows are whole responses; nothing may depend on the padding."""
