"""vLLM as the sampler, in the trainer's own process.  The only file that imports vllm, and only when an engine starts."""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from cppo_lightning.rollout.requests import (
    check_request,
    checked_weights,
    eos_token_ids,
    meta_parameters,
    read_config,
)

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM, RequestOutput
    from vllm.outputs import CompletionOutput

DTYPES = ("float32", "bfloat16", "float16")
INSTALL = "pip install 'cppo-lightning[vllm]' (with a GPU), make install-vllm (in a clone, without one)"
# what VLLMEngine sets itself, and where the user says it instead
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


class VLLMEngine(RolloutEngine):
    """Samples with vLLM (https://docs.vllm.ai) in this process; weights come in through vLLM's own reload.

    The trainer's random state, threads and environment are as before after each call.  On a CPU,
    ``VLLM_CPU_KVCACHE_SPACE`` (GiB, here 2 unless set) sizes the cache, and no code is compiled unless ``engine_args`` has
    ``enforce_eager: false``.

    Args:
        dtype: dtype of the sampling weights; float32 is the honest choice for small models on a CPU.
        max_top_logprobs: largest K of top-K log-probabilities that may be asked for.
        gpu_memory_utilization: share of the GPU's memory for vLLM's weights and cache; the rest is the trainer's.
        max_model_len: longest prompt and response together, in tokens; None takes the model's own limit.
        engine_args: any other engine argument of vLLM, by its name there.

    Raises:
        ConfigError: vLLM is not installed (with the command that installs it), or a value that cannot work.
    """

    def __init__(
        self,
        dtype: str = "float32",
        max_top_logprobs: int = 20,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"engine.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if max_top_logprobs < 0:
            raise ConfigError(f"engine.max_top_logprobs must be at least 0, got {max_top_logprobs}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        if max_model_len is not None and max_model_len < 2:
            raise ConfigError(f"engine.max_model_len must be at least 2, got {max_model_len}")
        for key in engine_args or {}:
            if key in RESERVED:
                raise ConfigError(f"engine.engine_args.{key} is set by the engine; use {RESERVED[key]}")
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(f"engine VLLMEngine needs vLLM, which is not installed; install it with: {INSTALL}")
        self.dtype = dtype
        self._max_top_logprobs = max_top_logprobs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.engine_args = dict(engine_args or {})
        self._llm: LLM | None = None
        self._version = -1

    @property
    def max_top_logprobs(self) -> int:
        return self._max_top_logprobs

    @property
    def version(self) -> int:
        return self._version

    def start(self, model: str) -> None:
        """Load ``model`` (a folder or hub id) into vLLM; later calls do nothing.

        Raises:
            ConfigError: there is no such model, or vLLM has no such engine argument.
        """
        if self._llm is not None:
            return
        self._config = read_config(model)
        self._eos = eos_token_ids(model, self._config)
        self._parameters = meta_parameters(self._config)
        self._owns_process_group = not torch.distributed.is_initialized()
        _set_environment()
        with _process_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's imports touch deprecated names of torch
            self._llm = self._load(model)

    def _load(self, model: str) -> LLM:
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform

        for key in self.engine_args:
            if key not in EngineArgs.__dataclass_fields__:
                raise ConfigError(f"engine.engine_args.{key} is no engine argument of the installed vLLM")
        defaults: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
        if current_platform.is_cpu():
            # compiling takes minutes and a C++ compiler and gains next to nothing; of a prompt only whole blocks are shared by
            # its samples, and at the CPU's default of 128 tokens a short prompt is read once per sample
            defaults |= {"enforce_eager": True, "block_size": 32}
        return LLM(
            model=model,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            logprobs_mode="processed_logprobs",
            max_logprobs=self.max_top_logprobs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len,
            trust_remote_code=False,
            **{**defaults, **self.engine_args},
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the trainer's parameters, by Hugging Face name, to vLLM; of tied ones, one is enough.

        Raises:
            RolloutError: a name is unknown or missing, or a shape differs.  The engine must not sample before the next
                complete load.
        """
        llm = self._loaded()
        self._version = -1
        with _process_state_kept():
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked_weights(weights, self._parameters)})
            llm.apply_model(_repack_output_head)
        llm.reset_prefix_cache()
        self._version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, top_logprobs: int = 0, seed: int = 0
    ) -> list[Completion]:
        """Draw ``n`` responses to each prompt, prompt-major.

        Log-probabilities are vLLM's processed ones: float32, at the sampling temperature, renormalised over the kept set under
        truncation (-inf outside it).  Temperature 0 takes the most likely token and reports log-probabilities at temperature 1.

        Raises:
            ConfigError: n or top_logprobs cannot work, or a prompt leaves no room for ``max_tokens`` in the context.
            RolloutError: a prompt is empty, or vLLM's answer is not one response per sample with its log-probabilities.
        """
        llm = self._loaded()
        check_request(self._config, prompts, n, sampling, top_logprobs, self.max_model_len)
        if top_logprobs > self.max_top_logprobs:
            raise ConfigError(f"top_logprobs {top_logprobs} should be at most engine.max_top_logprobs, {self.max_top_logprobs}")
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            n=n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop_token_ids=self._eos,
            logprobs=top_logprobs,
            flat_logprobs=True,
            detokenize=False,
        )
        # a cached prompt would change which requests run together, and with it the draws of a resumed run
        llm.reset_prefix_cache()
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        with _process_state_kept():
            # vLLM in process draws from torch's global generator; its own per-request seeds crash on a CPU
            torch.manual_seed(seed)
            answers = llm.generate(requests, params, use_tqdm=False)
        return _completions(answers, len(prompts), n, top_logprobs)

    def close(self) -> None:
        """Free vLLM's model, and the one-process group it made if there was none before."""
        if self._llm is None:
            return
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        destroy_model_parallel()
        if self._owns_process_group:
            destroy_distributed_environment()

    def _loaded(self) -> LLM:
        if self._llm is None:
            raise RolloutError("the engine has no model: call start(model) first")
        return self._llm


def _set_environment() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights and random state are handed over in process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # binding would pin the trainer's threads as well, and those of every rank to the same cores
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Put back what vLLM changes for the whole process: random states, ``torch.set_num_threads``, children's environment."""
    import numpy as np

    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    environment = {key: os.environ.get(key) for key in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _repack_output_head(model: torch.nn.Module) -> None:
    """Renew what the head computes with: on a CPU vLLM 0.32 packs a tied head once, and a reload renews the embedding alone."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _completions(answers: Sequence[RequestOutput], prompts: int, n: int, top_logprobs: int) -> list[Completion]:
    """vLLM's answers as tensors, prompt-major.

    Raises:
        RolloutError: an answer is missing, was aborted, or its log-probabilities belong to other tokens.
    """
    if len(answers) != prompts:
        raise RolloutError(f"vLLM answered {len(answers)} of {prompts} prompts")
    out: list[Completion] = []
    for i, answer in enumerate(answers):
        samples = sorted(answer.outputs, key=lambda sample: sample.index)
        if len(samples) != n or any(sample.finish_reason not in ("stop", "length") for sample in samples):
            reasons = [sample.finish_reason for sample in samples]
            raise RolloutError(f"prompt {i} of {prompts}: vLLM returned {len(samples)} of {n} samples, ended by {reasons}")
        out.extend(_completion(sample, i, top_logprobs) for sample in samples)
    return out


def _completion(sample: CompletionOutput, prompt: int, top_logprobs: int) -> Completion:
    """One sample; with fewer log-probabilities than tokens it is returned as it is, for ``Completion.check`` to refuse."""
    from vllm.logprobs import FlatLogprobs

    flat = sample.logprobs
    if not isinstance(flat, FlatLogprobs):
        raise RolloutError(f"prompt {prompt}: vLLM returned log-probabilities as {type(flat).__name__}, not FlatLogprobs")
    # per token the sampled one, then the top-K
    width = 1 + top_logprobs
    rows = len(flat.logprobs) // width
    logp = torch.tensor(flat.logprobs[: rows * width], dtype=torch.float32).view(rows, width)
    token = torch.tensor(flat.token_ids[: rows * width], dtype=torch.int64).view(rows, width)
    ids = torch.tensor(list(sample.token_ids), dtype=torch.int64)
    if not torch.equal(token[:, 0], ids[:rows]):
        raise RolloutError(f"prompt {prompt}: vLLM's log-probabilities belong to other tokens than it returned")
    finished = sample.finish_reason == "stop"
    if not top_logprobs:
        return Completion(ids, logp[:, 0], finished)
    return Completion(ids, logp[:, 0].clone(), finished, token[:, 1:].clone(), logp[:, 1:].clone())
