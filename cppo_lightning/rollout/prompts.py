"""Prompts, from a data set to token ids: the names that configs and code use."""

from __future__ import annotations

from cppo_lightning.rollout.bad_rows import BadRowError, BadRows, LoadCounts
from cppo_lightning.rollout.dapo import bare_question
from cppo_lightning.rollout.dataset_prompts import DatasetPrompts
from cppo_lightning.rollout.mixture import Mixture
from cppo_lightning.rollout.prompt_order import PromptOrder
from cppo_lightning.rollout.prompt_source import PromptSource, check_problems
from cppo_lightning.rollout.reasoning_gym_prompts import ReasoningGymPrompts
from cppo_lightning.rollout.templates import PromptTemplate

__all__ = [
    "BadRowError",
    "BadRows",
    "DatasetPrompts",
    "LoadCounts",
    "Mixture",
    "PromptOrder",
    "PromptSource",
    "PromptTemplate",
    "ReasoningGymPrompts",
    "bare_question",
    "check_problems",
]
