"""Rollouts: prompts in, judged samples with their log-probabilities out, cut into minibatches."""

from cppo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from cppo_lightning.rollout.prompts import (
    BadRowError,
    BadRows,
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
from cppo_lightning.rollout.transformers_engine import TransformersEngine
from cppo_lightning.rollout.vllm_client import Patience
from cppo_lightning.rollout.vllm_engine import VLLMEngine
from cppo_lightning.rollout.vllm_server_engine import VLLMServerEngine

__all__ = [
    "BadRowError",
    "BadRows",
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
