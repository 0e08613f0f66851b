"""vLLM as an engine: in process, or as one or several servers.  vLLM itself is imported when an engine starts."""

from cppo_lightning.engines.vllm.client import Patience
from cppo_lightning.engines.vllm.engine import VLLMEngine
from cppo_lightning.engines.vllm.server_engine import VLLMServerEngine

__all__ = ["Patience", "VLLMEngine", "VLLMServerEngine"]
