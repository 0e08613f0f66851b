"""Prompts, from a data set to token ids: the names that configs and code use."""

from __future__ import annotations

from cppo_lightning.rollout.dataset_prompts import DatasetPrompts
from cppo_lightning.rollout.prompt_source import PromptSource, check_problems
from cppo_lightning.rollout.reasoning_gym_prompts import ReasoningGymPrompts
from cppo_lightning.rollout.templates import PromptTemplate

__all__ = ["DatasetPrompts", "PromptSource", "PromptTemplate", "ReasoningGymPrompts", "check_problems"]
