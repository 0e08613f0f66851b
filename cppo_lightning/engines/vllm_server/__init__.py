"""vLLM as one or several servers: the trainer's end, the fleet that rank 0 keeps, and what runs inside a server."""

from cppo_lightning.engines.vllm_server.client import Patience
from cppo_lightning.engines.vllm_server.engine import VLLMServerEngine

__all__ = ["Patience", "VLLMServerEngine"]
