"""What a run may have to be told about itself, as rules over its metrics; callback ``Explain`` asks them."""

from __future__ import annotations

from cppo_lightning.callbacks.explanations.responses import CutOff, EqualRewards, Unparseable, VerifierFailures
from cppo_lightning.callbacks.explanations.rule import Explanation, Rule, Seen
from cppo_lightning.callbacks.explanations.trust_region import EarlyExhaustion, LargeDivergence, LargeMismatch, MostlyDropped
from cppo_lightning.callbacks.explanations.updates import LowEntropy, ZeroLoss

RULES: dict[str, Rule] = {
    "equal_rewards": EqualRewards(),
    "cut_off": CutOff(),
    "unparseable": Unparseable(),
    "verifier_failures": VerifierFailures(),
    "zero_loss": ZeroLoss(),
    "low_entropy": LowEntropy(),
    "large_divergence": LargeDivergence(),
    "large_mismatch": LargeMismatch(),
    "early_exhaustion": EarlyExhaustion(),
    "mostly_dropped": MostlyDropped(),
}
"""The rules that ``Explain`` asks unless told otherwise."""

__all__ = [
    "RULES",
    "CutOff",
    "EarlyExhaustion",
    "EqualRewards",
    "Explanation",
    "LargeDivergence",
    "LargeMismatch",
    "LowEntropy",
    "MostlyDropped",
    "Rule",
    "Seen",
    "Unparseable",
    "VerifierFailures",
    "ZeroLoss",
]
