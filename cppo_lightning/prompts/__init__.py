"""Prompts, from a data set to token ids: the names that configs and code use."""

from __future__ import annotations

from cppo_lightning.prompts.bad_rows import BadRowError, BadRows, LoadCounts
from cppo_lightning.prompts.chain_prompts import ChainPrompts
from cppo_lightning.prompts.dapo import bare_question
from cppo_lightning.prompts.dataset_prompts import DatasetPrompts
from cppo_lightning.prompts.mixture import Mixture
from cppo_lightning.prompts.prompt_order import PromptOrder
from cppo_lightning.prompts.prompt_source import PromptSource, check_problems
from cppo_lightning.prompts.reasoning_gym_prompts import ReasoningGymPrompts
from cppo_lightning.prompts.templates import PromptTemplate

__all__ = [
    "BadRowError",
    "BadRows",
    "ChainPrompts",
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
