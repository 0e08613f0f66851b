"""Rollouts: prompts in, judged samples with their log-probabilities out, cut into minibatches."""

from cppo_lightning.engines import (
    Completion,
    Patience,
    RolloutEngine,
    Sampling,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
)
from cppo_lightning.prompts import (
    BadRowError,
    BadRows,
    ChainPrompts,
    DatasetPrompts,
    LoadCounts,
    Mixture,
    PromptOrder,
    PromptSource,
    PromptTemplate,
    ReasoningGymPrompts,
    bare_question,
    check_problems,
)
from cppo_lightning.rollout.sampler import Rollout, Sample, Sampler
from cppo_lightning.rollout.stream import RolloutPlan, RolloutStream

__all__ = [
    "BadRowError",
    "BadRows",
    "ChainPrompts",
    "Completion",
    "DatasetPrompts",
    "LoadCounts",
    "Mixture",
    "Patience",
    "PromptOrder",
    "PromptSource",
    "PromptTemplate",
    "ReasoningGymPrompts",
    "Rollout",
    "RolloutEngine",
    "RolloutPlan",
    "RolloutStream",
    "Sample",
    "Sampler",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "bare_question",
    "check_problems",
]
