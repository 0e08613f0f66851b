"""Judging responses: verifiers, and a pool of processes that runs them.  Imports no torch."""

from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.by_dataset import ByDataset
from cppo_lightning.verifiers.chain import ChainVerifier
from cppo_lightning.verifiers.format import Format
from cppo_lightning.verifiers.math_answer import MathAnswer
from cppo_lightning.verifiers.overlong import Overlong
from cppo_lightning.verifiers.pool import VerifierPool
from cppo_lightning.verifiers.reasoning_gym import ReasoningGym
from cppo_lightning.verifiers.weighted_sum import WeightedSum

__all__ = [
    "ByDataset",
    "ChainVerifier",
    "Format",
    "MathAnswer",
    "Outcome",
    "Overlong",
    "Problem",
    "ReasoningGym",
    "Verdict",
    "Verifier",
    "VerifierPool",
    "WeightedSum",
]
