"""Several trust regions at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cppo_lightning.batch import Gate
from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions.base import TrustRegion

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.batch import TokenStats

# what diagnostics say of the divergence beside them: of another region's they would be wrong
_OF_A_DIVERGENCE = frozenset({"token_weight", "weighted_divergence", "budget_allowed"})


@dataclass(frozen=True)
class Intersection(TrustRegion):
    """Keeps the tokens that all of its trust regions keep, at the weight that the first one gives them.

    The others only drop, so among trust regions that weight kept tokens by rho (PPOClip, DPPO, TRM, CPPO) the order does not
    matter; put one that changes the weight (CISPO, MinPRO, GSPO, SAPO, SoftCPPO) first.  What the first one trains on in spite
    of ``keep``, as SoftCPPO does, keeps its weight where the others keep it.  With two ``TRM`` it is TRM's Max & Avg (arXiv
    2512.23075).  Where two give a diagnostic of one name the first one's stands, but ``rejected`` is true where any is.
    Next to the divergence of one region there are no weights and weighted sums of another's.

    Args:
        trust_regions: at least one.

    Raises:
        ConfigError: none given.
    """

    trust_regions: list[TrustRegion]

    def __post_init__(self) -> None:
        if not self.trust_regions:
            raise ConfigError("Intersection.trust_regions must hold at least one trust region, got []")

    @property
    def top_k(self) -> int:
        return max(region.top_k for region in self.trust_regions)

    @property
    def recomputable(self) -> bool:
        return all(region.recomputable for region in self.trust_regions)

    @property
    def token_threshold(self) -> float | None:
        """That of the first trust region with a divergence, since that divergence is the one that gates show."""
        shown = next((region for region in self.trust_regions if hasattr(region, "divergence")), None)
        return None if shown is None else shown.token_threshold

    def state_dict(self) -> dict[str, Any]:
        """Each trust region's state, by its number from 0."""
        return {str(number): region.state_dict() for number, region in enumerate(self.trust_regions)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for number, region in enumerate(self.trust_regions):
            if str(number) in state:  # checkpoints used to hold no state of an intersection
                region.load_state_dict(state[str(number)])

    def __call__(self, stats: TokenStats) -> Gate:
        first, *others = (region(stats) for region in self.trust_regions)
        allowed = stats.mask  # [B, T] bool, what none of the others drops
        diagnostics: dict[str, Tensor] = dict(first.diagnostics)
        for gate in others:
            allowed = allowed & gate.keep
            # "surrogate" is the value of that region's own objective, which is not this one's
            left_out = {"surrogate"} | (_OF_A_DIVERGENCE if "divergence" in diagnostics else set())
            added = {name: value for name, value in gate.diagnostics.items() if name not in left_out}
            if "rejected" in added and "rejected" in diagnostics:
                added["rejected"] = added["rejected"] | diagnostics.pop("rejected")
            diagnostics = added | diagnostics
        if "surrogate" in diagnostics:
            diagnostics["surrogate"] = diagnostics["surrogate"].masked_fill(~allowed, 0.0)
        return Gate(weight=first.weight.masked_fill(~allowed, 0.0), keep=first.keep & allowed, diagnostics=diagnostics)
