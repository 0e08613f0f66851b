"""vLLM as the sampler, in the trainer's own process; vllm is imported when an engine starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cppo_lightning.engines.engine import Completion, OnCompletion, RolloutEngine, Sampling
from cppo_lightning.engines.requests import (
    Completions,
    check_request,
    checked_weights,
    eos_token_ids,
    meta_parameters,
    read_config,
)
from cppo_lightning.engines.vllm.capture import CapturedResponse
from cppo_lightning.engines.vllm.lent_memory import WEIGHTS, LentMemory
from cppo_lightning.engines.vllm.process_state import process_state_kept, set_environment
from cppo_lightning.engines.vllm.settings import (
    CPU_DEFAULTS,
    IN_PROCESS,
    check_installed,
    check_one_process,
    check_settings,
    end_reload,
    repack_output_head,
    sampling_params,
    shut_down,
)
from cppo_lightning.engines.vllm.weights import received
from cppo_lightning.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


class VLLMEngine(RolloutEngine):
    """Samples with vLLM (https://docs.vllm.ai) in this process; weights come in through vLLM's own reload.

    Each rank has an engine of its own, on its own GPU, which samples that rank's prompts.  The trainer's random state, threads,
    environment and process group are as before after each call.  On a CPU, ``VLLM_CPU_KVCACHE_SPACE`` (GiB, here 2 unless set)
    sizes the cache, and no code is compiled unless ``engine_args`` has ``enforce_eager: false``.

    Args:
        dtype: dtype of the sampling weights; float32 is the honest choice for small models on a CPU.
        max_top_logprobs: largest K of top-K log-probabilities that may be asked for.
        gpu_memory_utilization: share of the GPU's memory for vLLM's weights and cache; the rest is the trainer's.
        max_model_len: longest prompt and response together, in tokens; None takes the model's own limit.
        sleep: after sampling, move the weights to the CPU's memory and drop the cache, so that the trainer has the GPU to
            itself; no effect on a CPU.
        engine_args: any other engine argument of vLLM, by its name there.

    Raises:
        ConfigError: vLLM is not installed or of a version that was not tested (with what to do), or a value that cannot work.
    """

    def __init__(
        self,
        dtype: str = "float32",
        max_top_logprobs: int = 20,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int | None = None,
        sleep: bool = True,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        check_settings(dtype, max_top_logprobs, gpu_memory_utilization, max_model_len, engine_args or {}, IN_PROCESS)
        check_one_process(engine_args or {})
        check_installed(type(self).__name__)
        self.dtype = dtype
        self._max_top_logprobs = max_top_logprobs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.sleep = sleep
        self.engine_args = dict(engine_args or {})
        self._llm: LLM | None = None
        self._checksums: dict[str, int] | None = None
        self._version = -1
        self._request_ids = map(str, count())

    @property
    def max_top_logprobs(self) -> int:
        return self._max_top_logprobs

    @property
    def version(self) -> int:
        return self._version

    def checksums(self) -> Mapping[str, int] | None:
        return self._checksums

    def start(self, model: str) -> None:
        """Load ``model`` (a folder or hub id) into vLLM; later calls do nothing.  Every rank must call it.

        Raises:
            ConfigError: there is no such model, or vLLM has no such engine argument.
        """
        if self._llm is not None:
            return
        self._config = read_config(model)
        self._eos = eos_token_ids(model, self._config)
        self._parameters = meta_parameters(self._config)
        self._owns_process_group = not torch.distributed.is_initialized()
        set_environment()
        with process_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's imports touch deprecated names of torch
            self._llm, sleeps = self._load(model)
        self._memory = LentMemory(self._llm if sleeps else None)

    def _load(self, model: str) -> tuple[LLM, bool]:
        """vLLM with ``model``, and whether it can sleep."""
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform

        for key in self.engine_args:
            if key not in EngineArgs.__dataclass_fields__:
                raise ConfigError(f"engine.engine_args.{key} is no engine argument of the installed vLLM")
        defaults: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
        if current_platform.is_cpu():
            defaults |= CPU_DEFAULTS
        elif torch.cuda.is_available():
            # an engine in process takes the first GPU that it sees, on every rank
            defaults["device_ids"] = [torch.cuda.current_device()]
        sleeps = self.sleep and current_platform.is_sleep_mode_available()
        llm = LLM(
            model=model,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            logprobs_mode="processed_logprobs",
            max_logprobs=self.max_top_logprobs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len,
            enable_sleep_mode=sleeps,
            trust_remote_code=False,
            **{**defaults, **self.engine_args},
        )
        return llm, sleeps

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the trainer's parameters, by Hugging Face name, to vLLM; of tied ones, one is enough.

        Raises:
            RolloutError: a name is unknown or missing, or a shape differs.  The engine must not sample before the next
                complete load.
        """
        llm = self._loaded()
        self._version, self._checksums = -1, None
        checksums: dict[str, int] = {}
        checked = received(checked_weights(weights, self._parameters), getattr(torch, self.dtype), checksums)
        with process_state_kept():
            self._memory.bring(WEIGHTS)
            try:
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked})
            except BaseException:
                llm.apply_model(partial(end_reload, config=llm.llm_engine.vllm_config))
                raise
            llm.apply_model(repack_output_head)
        llm.reset_prefix_cache()
        self._version, self._checksums = version, checksums

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        top_logprobs: int = 0,
        seed: int = 0,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Draw ``n`` responses to each prompt, prompt-major; each is handed to ``on_completion`` at the step that ends it.

        Log-probabilities are vLLM's processed ones: float32, at the sampling temperature, renormalised over the kept set under
        truncation (-inf outside it).  Temperature 0 takes the most likely token and reports log-probabilities at temperature 1.

        Raises:
            ConfigError: n or top_logprobs cannot work, or a prompt leaves no room for ``max_tokens`` in the context.
            RolloutError: a prompt is empty, or vLLM aborted a response or returned other log-probabilities than asked for.
        """
        llm = self._loaded()
        check_request(self._config, prompts, n, sampling, top_logprobs, self.max_model_len)
        if top_logprobs > self.max_top_logprobs:
            raise ConfigError(f"top_logprobs {top_logprobs} should be at most engine.max_top_logprobs, {self.max_top_logprobs}")
        from vllm import SamplingParams

        params = SamplingParams(**sampling_params(sampling, top_logprobs, self._eos))
        # a cached prompt would change which requests run together, and with it the draws of a resumed run
        llm.reset_prefix_cache()
        completions = Completions(len(prompts) * n, on_completion)
        with process_state_kept(), self._memory.in_use():
            # vLLM in process draws from the global generators: a CPU's tokens from torch's, and on CUDA, with Triton, each
            # request's seed from numpy's; seeds of our own for each request would crash on a CPU
            torch.manual_seed(seed)
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # it takes 32 bits at a time
            self._run(llm.llm_engine, prompts, n, params, completions)
        return completions.all()

    def _run(
        self, engine: LLMEngine, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams, completions: Completions
    ) -> None:
        """What ``LLM.generate`` does, one level below: on the engine core, whose outputs still hold arrays.

        What ends it early aborts the rest, so that the next call begins with none of it.
        """
        from vllm.inputs import tokens_input

        core, running = engine.engine_core, dict[str, CapturedResponse]()
        try:
            for i, prompt in enumerate(prompts):
                request = engine.input_processor.process_inputs(
                    "", tokens_input(list(prompt)), params, supported_tasks=engine.get_supported_tasks()
                )
                for place in range(i * n, (i + 1) * n):
                    sample = copy(request)
                    # never used twice: steps under way may still answer for what an earlier call has aborted
                    sample.request_id = next(self._request_ids)
                    core.add_request(sample)
                    running[sample.request_id] = CapturedResponse(place, params.logprobs or 0)
            while running:
                for output in core.get_output().outputs:
                    response = running.get(output.request_id)
                    if response is None:
                        continue
                    response.add(output.new_token_ids, output.new_logprobs)
                    if output.finish_reason is not None:
                        del running[output.request_id]
                        completions.add(response.place, response.completion(str(output.finish_reason)))
        finally:
            core.abort_requests(list(running))

    def close(self) -> None:
        """Free vLLM's model, and the process groups it made; the trainer's stays as it is."""
        if self._llm is None:
            return
        shut_down(self._llm, self._owns_process_group)
        self._llm, self._checksums = None, None
        self._version = -1

    def _loaded(self) -> LLM:
        if self._llm is None:
            raise RolloutError("the engine has no model: call start(model) first")
        return self._llm
