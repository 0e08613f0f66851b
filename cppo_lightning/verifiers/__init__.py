"""Judging responses: verifiers, and a pool of processes that runs them.  Imports no torch."""

from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.format import Format
from cppo_lightning.verifiers.math_answer import MathAnswer
from cppo_lightning.verifiers.overlong import Overlong
from cppo_lightning.verifiers.pool import VerifierPool
from cppo_lightning.verifiers.reasoning_gym import ReasoningGym

__all__ = ["Format", "MathAnswer", "Outcome", "Overlong", "Problem", "ReasoningGym", "Verdict", "Verifier", "VerifierPool"]
