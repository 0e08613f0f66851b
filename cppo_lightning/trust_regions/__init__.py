"""Trust regions: where the policy may move.  One strategy, one file."""

from cppo_lightning.trust_regions.base import TrustRegion
from cppo_lightning.trust_regions.cispo import CISPO
from cppo_lightning.trust_regions.cppo import CPPO
from cppo_lightning.trust_regions.dppo import DPPO
from cppo_lightning.trust_regions.fixed_horizon_cppo import FixedHorizonCPPO
from cppo_lightning.trust_regions.gspo import GSPO
from cppo_lightning.trust_regions.intersection import Intersection
from cppo_lightning.trust_regions.minpro import MinPRO
from cppo_lightning.trust_regions.ppo_clip import PPOClip
from cppo_lightning.trust_regions.sapo import SAPO
from cppo_lightning.trust_regions.shuffled_cppo import ShuffledCPPO
from cppo_lightning.trust_regions.soft_cppo import SoftCPPO
from cppo_lightning.trust_regions.trm import TRM

__all__ = [
    "CISPO",
    "CPPO",
    "DPPO",
    "GSPO",
    "SAPO",
    "TRM",
    "FixedHorizonCPPO",
    "Intersection",
    "MinPRO",
    "PPOClip",
    "ShuffledCPPO",
    "SoftCPPO",
    "TrustRegion",
]
