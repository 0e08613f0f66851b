"""vLLM as one or several servers, started by the project or running elsewhere: how a run outgrows one machine."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from cppo_lightning.engines.vllm.settings import CPU_DEFAULTS, RESERVED, check_installed, check_settings
from cppo_lightning.engines.vllm_server.answers import request_body
from cppo_lightning.engines.vllm_server.client import Patience, Server, is_loopback
from cppo_lightning.engines.vllm_server.fleet import Fleet
from cppo_lightning.engines.vllm_server.process import REQUIRED, ServerProcess
from cppo_lightning.engines.vllm_server.sampling import sampled
from cppo_lightning.engines.vllm_server.weight_transfer import check_way, transfer_by
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.ranks import from_rank_zero, is_rank_zero

if TYPE_CHECKING:
    from torch import Tensor

_RESERVED = {name: where for name, where in RESERVED.items() if name != "gpu_memory_utilization"} | {
    "host": "engine.host",
    "port": "nothing: a free one is taken",
    "weight_transfer_config": "engine.weight_transfer",
    "api_key": "the variable named by engine.api_key_env",
    **dict.fromkeys(REQUIRED, "nothing: the engine needs its own"),
}


class VLLMServerEngine(RolloutEngine):
    """Samples with vLLM servers (https://docs.vllm.ai) over HTTP, each rank its own prompts with all servers.

    Rank 0 starts the servers, on the devices that it sees itself, and looks after them: one that ends or is wedged is started
    again with the current weights, while its unanswered prompts go to the others.  Every prompt
    has a random stream of its own, so that neither its server nor a restart changes its samples, up to the rounding of sums,
    which depends on what is computed together.  Servers answer only those who know their API key; on loopback a random
    one is made.  The key and all else travel in clear, unless a url begins with https.

    Args:
        servers: how many to start on this machine.
        urls: addresses of servers that run elsewhere, instead; docs/engines.md says how to start them.
        host: address that servers started here bind; all but loopback needs an API key.
        dtype: dtype of the sampling weights; float32 is the honest choice for small models on a CPU.
        max_top_logprobs: largest K of top-K log-probabilities that may be asked for.
        max_model_len: longest prompt and response together, in tokens; None takes the model's own limit.
        engine_args: any other argument of vLLM's server, by its name with underscores, such as ``gpu_memory_utilization``.
        api_key_env: environment variable that holds the API key.
        weights_folder: where weights and the servers' logs are written; trainer and servers must see it under the same path.
            None takes a temporary one, for servers on this machine.
        weight_transfer: how weights go to servers: "folder", or by vLLM's weight-transfer API "gloo" (over TCP, any device),
            "nccl" (CUDA, servers elsewhere) or "ipc" (CUDA, servers started here, one rank); nccl and ipc have not been run.
        patience: time-outs, and the number of restarts; unless that is 0, weights go into the folder too, whichever the way.

    Raises:
        ConfigError: vLLM is not installed, a value cannot work, or a key is needed and not set.
    """

    concurrent = True

    def __init__(
        self,
        servers: int = 1,
        urls: list[str] | None = None,
        host: str = "127.0.0.1",
        dtype: str = "float32",
        max_top_logprobs: int = 20,
        max_model_len: int | None = None,
        engine_args: dict[str, Any] | None = None,
        api_key_env: str = "CPPO_VLLM_API_KEY",
        weights_folder: str | None = None,
        weight_transfer: Literal["folder", "gloo", "nccl", "ipc"] = "folder",
        patience: Patience = Patience(),
    ) -> None:
        check_settings(dtype, max_top_logprobs, None, max_model_len, engine_args or {}, _RESERVED)
        if servers < 1:
            raise ConfigError(f"engine.servers must be at least 1, got {servers}")
        public = urls is not None or not is_loopback(host)
        if public and not os.environ.get(api_key_env):
            where = "engine.urls" if urls is not None else f"engine.host {host!r}"
            raise ConfigError(
                f"{where} can be reached from elsewhere, and who reaches a server can change its weights: set its API key in "
                f"the environment variable {api_key_env} (a long random one), or take engine.host 127.0.0.1"
            )
        if urls is None:
            check_installed("VLLMServerEngine")
        elif not urls or servers != 1 or engine_args:
            raise ConfigError("engine.urls should name at least one running server, and goes without servers and engine_args")
        elif weights_folder is None and (weight_transfer == "folder" or patience.restarts):
            raise ConfigError(
                "engine.urls needs engine.weights_folder, which trainer and servers see under the same path; without one, take "
                "engine.weight_transfer gloo or nccl and engine.patience.restarts 0"
            )
        check_way(weight_transfer, urls is not None, engine_args or {})
        self.servers = servers
        self.urls = urls
        self.host = host
        self.dtype = dtype
        self._max_top_logprobs = max_top_logprobs
        self.max_model_len = max_model_len
        self.engine_args = dict(engine_args or {})
        self.api_key_env = api_key_env
        self.weights_folder = weights_folder
        self.weight_transfer = weight_transfer
        self.patience = patience
        self._servers: list[Server] = []
        self._fleet: Fleet | None = None  # on rank 0 alone
        self._checksums: dict[str, int] | None = None
        self._label: str | None = None  # what servers must have to be sampled from
        self._loads = 0
        self._version = -1

    @property
    def max_top_logprobs(self) -> int:
        return self._max_top_logprobs

    @property
    def version(self) -> int:
        """``version`` of the last ``load_weights`` that all servers confirmed; -1 before the first."""
        return self._version

    def checksums(self) -> Mapping[str, int] | None:
        return self._checksums

    def start(self, model: str) -> None:
        """Have servers load ``model`` (a folder or hub id); later calls do nothing.  Every rank must call it.

        Raises:
            ConfigError: there is no such model, a server ended at its start (with its last lines), is open to all, or runs with
                other settings than these.
            RolloutError: a server elsewhere does not answer.
        """
        if self._servers:
            return
        self._config = read_config(model)
        self._eos = eos_token_ids(model, self._config)
        self._parameters = meta_parameters(self._config)
        self._transfer = transfer_by(self.weight_transfer, getattr(torch, self.dtype), self._parameters.values(), self.patience)
        urls, key, self._run, self._limits = from_rank_zero(lambda: self._start_fleet(model))
        self._servers = [Server(url, key, self.patience, ours=self.urls is None) for url in urls]
        self._label = f"{self._run}/0" if self.urls is None else None  # weights elsewhere may be anyone's

    def _start_fleet(self, model: str) -> tuple[list[str], str, str, dict[str, int]]:
        """On rank 0: the servers' addresses and key, this run's name, and what requests are limited to."""
        run = secrets.token_hex(4)
        folder = Path(self.weights_folder or tempfile.gettempdir()).expanduser() / f"vllm-{run}"
        folder.mkdir(parents=True, mode=0o700 if self.urls is None else 0o755)
        key = os.environ.get(self.api_key_env) or secrets.token_urlsafe(32)
        places = self.urls or [
            ServerProcess(self.host, self._arguments(model), key, folder, f"server-{i}.log") for i in range(self.servers)
        ]
        self._fleet = fleet = Fleet(places, key, folder, f"{run}/0", self.patience, self._transfer)
        try:
            fleet.start()
            limits = fleet.limits(model, self.dtype, self.max_top_logprobs, self.max_model_len)
        except BaseException:
            self.close()
            raise
        return fleet.urls, key, run, limits

    def _arguments(self, model: str) -> dict[str, Any]:
        # a prompt that is read in pieces would turn back its random generator, which a CPU's cannot do
        on_cpu = {} if torch.cuda.is_available() else CPU_DEFAULTS | {"enable_chunked_prefill": False}
        ours = {
            "model": model,
            "dtype": self.dtype,
            "max_logprobs": self.max_top_logprobs,
            "max_model_len": self.max_model_len,
            "weight_transfer_config": self._transfer.backend and {"backend": self._transfer.backend},
        }
        return {**on_cpu, **self.engine_args, **ours}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand the trainer's parameters, by Hugging Face name, to every server; of tied ones, one is enough.

        Every rank must call it, since gathering ``weights`` may take all of them; rank 0 sends.

        Raises:
            RolloutError: a name is unknown or missing, a shape differs, or a server did not take them over.  The engine does
                not sample before the next complete load.
        """
        self._started()
        self._version, self._label, self._checksums = -1, None, None
        self._loads += 1
        label = f"{self._run}/{self._loads}"
        checked = checked_weights(weights, self._parameters)
        if not is_rank_zero():
            for _ in checked:
                pass
        self._checksums = from_rank_zero(lambda: self._started_fleet().load(checked, label))
        self._version, self._label = version, label

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        top_logprobs: int = 0,
        seed: int = 0,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Draw ``n`` responses to each prompt, prompt-major; a prompt's are handed to ``on_completion`` when all have ended.

        Log-probabilities are vLLM's processed ones: float32, at the sampling temperature, renormalised over the kept set under
        truncation (-inf outside it).  Temperature 0 takes the most likely token and reports log-probabilities at temperature 1.

        Raises:
            ConfigError: n or top_logprobs cannot work, or a prompt leaves no room for ``max_tokens`` in the context.
            RolloutError: a prompt is empty, the last weights did not arrive, servers were lost too often or stay away, or one
                cut a response off or returned other log-probabilities than asked for.
        """
        self._started()
        check_request(self._config, prompts, n, sampling, top_logprobs, self._limits["max_model_len"])
        for name, value, most in (
            ("top_logprobs", top_logprobs, self.max_top_logprobs),
            ("n", n, self._limits["max_num_seqs"]),
        ):
            if value > most:
                raise ConfigError(f"{name} {value} should be at most {most}, which the servers are set to")
        if self._label is None:
            raise RolloutError("the servers do not have the trainer's weights: call load_weights first")
        bodies = [
            request_body(prompt, number, n, sampling, top_logprobs, seed, self._eos) for number, prompt in enumerate(prompts)
        ]
        completions = Completions(len(prompts) * n, on_completion)
        check = self._fleet.check if self._fleet is not None else lambda: None
        with closing(sampled(bodies, self._servers, self._label, self.patience, check)) as answers:
            for number, answer in answers:
                for place, completion in answer.completions(number * n, n, top_logprobs):
                    completions.add(place, completion)
        return completions.all()

    def close(self) -> None:
        """End the servers started here; those elsewhere keep running."""
        if self._fleet is not None:
            self._fleet.close()
        self._fleet, self._servers = None, []
        self._version, self._label, self._checksums = -1, None, None

    def _started(self) -> None:
        if not self._servers:
            raise RolloutError("the engine has no model: call start(model) first")

    def _started_fleet(self) -> Fleet:
        assert self._fleet is not None, "rank 0 has it once it has started"
        return self._fleet
