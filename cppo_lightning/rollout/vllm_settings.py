"""What holds for vLLM in process and as a server alike: its settings, and a repair after new weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")
INSTALL = "pip install 'cppo-lightning[vllm]' (with a GPU), make install-vllm (in a clone, without one)"
# what the engines set themselves, and where the user says it instead
RESERVED = {
    "model": "the model's own setting",
    "seed": "the seed of each call",
    "dtype": "engine.dtype",
    "max_logprobs": "engine.max_top_logprobs",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "max_model_len": "engine.max_model_len",
    "logprobs_mode": "nothing: ratios need the processed ones",
    "trust_remote_code": "nothing: no model brings its own code",
}
# Compiling takes minutes and a C++ compiler and gains next to nothing; of a prompt only whole blocks are shared by its samples,
# and at the CPU's default of 128 tokens a short prompt is read once per sample.
CPU_DEFAULTS = {"enforce_eager": True, "block_size": 32}


def check_settings(
    dtype: str,
    max_top_logprobs: int,
    gpu_memory_utilization: float | None,
    max_model_len: int | None,
    engine_args: Mapping[str, Any],
    reserved: Mapping[str, str] = RESERVED,
) -> None:
    """Raise :class:`ConfigError` for a value that cannot work, or an engine argument that the engine sets itself."""
    if dtype not in DTYPES:
        raise ConfigError(f"engine.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if max_top_logprobs < 0:
        raise ConfigError(f"engine.max_top_logprobs must be at least 0, got {max_top_logprobs}")
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(f"engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
    if max_model_len is not None and max_model_len < 2:
        raise ConfigError(f"engine.max_model_len must be at least 2, got {max_model_len}")
    for key in engine_args:
        if key in reserved:
            raise ConfigError(f"engine.engine_args.{key} is set by the engine; use {reserved[key]}")


def check_installed(engine: str) -> None:
    """Raise :class:`ConfigError`, with the command that installs it, if vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"engine {engine} needs vLLM, which is not installed; install it with: {INSTALL}")


def repack_output_head(model: nn.Module) -> None:
    """Renew what the head computes with: on a CPU vLLM 0.32 packs a tied head once, and a reload renews the embedding alone."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
