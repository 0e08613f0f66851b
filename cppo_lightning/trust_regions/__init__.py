"""Trust regions: where the policy may move.  One strategy, one file."""

from cppo_lightning.trust_regions.base import TrustRegion
from cppo_lightning.trust_regions.cppo import CPPO
from cppo_lightning.trust_regions.ppo_clip import PPOClip

__all__ = ["CPPO", "PPOClip", "TrustRegion"]
