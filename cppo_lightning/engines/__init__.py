"""Engines sample: fresh weights in, token ids with their log-probabilities out."""

from cppo_lightning.engines.engine import Completion, RolloutEngine, Sampling
from cppo_lightning.engines.transformers_engine import TransformersEngine
from cppo_lightning.engines.vllm.engine import VLLMEngine
from cppo_lightning.engines.vllm_server import Patience, VLLMServerEngine

__all__ = ["Completion", "Patience", "RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"]
