"""The embedded sampler: batched generation with a KV cache on plain transformers, nothing else to install."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from cppo_lightning.engines.checksums import checksums
from cppo_lightning.engines.draw import Draw, draw
from cppo_lightning.engines.engine import Completion, OnCompletion, RolloutEngine, Sampling
from cppo_lightning.engines.requests import (
    Completions,
    check_dtype,
    check_request,
    checked_weights,
    eos_token_ids,
    read_config,
)
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.policy_config import DType

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel


class TransformersEngine(RolloutEngine):
    """Samples with its own copy of the model, on one device, in this process.

    A prompt is read once per batch, however many samples it gets; finished rows leave the batch.  torch's global random
    state is neither used nor changed.

    Args:
        dtype: dtype of the sampling weights; float32 is the honest choice for small models on a CPU, where bfloat16 alone
            can spend half of a prefix budget.
        device: auto (the current CUDA device, else the CPU), or a torch device such as cpu or cuda:1.
        max_sequences: responses generated at once; the rest waits.  Bounds the memory of the cache.
        attn_implementation: attention of transformers, for example sdpa or eager.

    Raises:
        ConfigError: a value that cannot work.
    """

    concurrent = True

    def __init__(
        self, dtype: DType = "float32", device: str = "auto", max_sequences: int = 64, attn_implementation: str = "sdpa"
    ) -> None:
        check_dtype(dtype)
        if max_sequences < 1:
            raise ConfigError(f"engine.max_sequences must be at least 1, got {max_sequences}")
        self.dtype = dtype
        self.device = device
        self.max_sequences = max_sequences
        self.attn_implementation = attn_implementation
        self._model: PreTrainedModel | None = None
        self._version = -1

    @property
    def max_top_logprobs(self) -> None:
        return None

    @property
    def version(self) -> int:
        return self._version

    def start(self, model: str) -> None:
        """Load ``model`` (a folder or hub id) for sampling; later calls do nothing.

        Raises:
            ConfigError: there is no such model or device.
        """
        if self._model is not None:
            return
        from transformers import AutoModelForCausalLM

        from cppo_lightning.engines.fast_decoding import speed_up

        device = _device(self.device)
        eos = eos_token_ids(model, read_config(model))
        # models whose checkpoint lacks a buffer or head initialise it from the global generator
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, self.dtype), attn_implementation=self.attn_implementation, trust_remote_code=False
            )
        self._model = loaded.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self._eos = torch.tensor(eos, device=device)
        speed_up(self._model)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the trainer's parameters, by Hugging Face name, into the engine's; of tied ones, one is enough.

        Raises:
            RolloutError: a name is unknown or missing, or a shape differs.  The engine must not sample before the next
                complete load.
        """
        model = self._loaded()
        self._version = -1
        parameters = model.state_dict(keep_vars=True)
        for name, tensor in checked_weights(weights, parameters):
            parameters[name].copy_(tensor)
            del tensor  # two whole parameters would be held otherwise, this one while the next is gathered
        self._version = version

    @torch.inference_mode()
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

        Log-probabilities are computed in float32 from the full softmax at the sampling temperature; under truncation they are
        those of the renormalised kept set, and top-K entries outside it are -inf.  Temperature 0 takes the most likely token
        and reports log-probabilities at temperature 1.

        Raises:
            ConfigError: n or top_logprobs cannot work, or a prompt leaves no room for ``max_tokens`` in the model's context.
            RolloutError: a prompt is empty.
        """
        model = self._loaded()
        check_request(model.config, prompts, n, sampling, top_logprobs)
        generator = torch.Generator(model.device).manual_seed(seed)
        # prompts of like length share a batch, so that little is padded; longest first, so that a lack of memory shows at once
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        queue = [i * n + sample for i in by_length for sample in range(n)]
        completions = Completions(len(queue), on_completion)
        for start in range(0, len(queue), self.max_sequences):
            rows = queue[start : start + self.max_sequences]
            repeats = Counter(index // n for index in rows)
            batch = _Batch(model, [prompts[i] for i in repeats], list(repeats.values()), sampling, top_logprobs)
            for row, completion in batch.run(self._eos, generator):
                completions.add(rows[row], completion)
        return completions.all()

    def checksums(self) -> dict[str, int]:
        """Of the weights that it computes with, tied ones once."""
        return checksums(self._loaded().named_parameters(), getattr(torch, self.dtype))

    def close(self) -> None:
        self._model = None
        self._version = -1

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            raise RolloutError("the engine has no model: call start(model) first")
        return self._model


class _Batch:
    """Responses that are generated side by side.

    Shapes: P prompts, S tokens of the longest, R rows (responses), r rows still running, T ``max_tokens``, K top-k entries.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[Sequence[int]], repeats: list[int], sampling: Sampling, top_logprobs: int
    ) -> None:
        """``repeats[i]`` rows for ``prompts[i]``."""
        self.model = model
        self.prompts = prompts
        self.sampling = sampling
        self.top_logprobs = top_logprobs
        device, rows, longest = model.device, sum(repeats), sampling.max_tokens
        counts = torch.tensor(repeats, device=device)
        self.prompt_of = torch.arange(len(prompts), device=device).repeat_interleave(counts)  # [R]
        self.ids = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        # not the default dtype: while a half-precision policy is trained in another thread, that is its own
        self.logp = torch.zeros(rows, longest, dtype=torch.float32, device=device)
        self.topk_ids = torch.zeros(rows, longest, top_logprobs, dtype=torch.int64, device=device)
        self.topk_logp = torch.zeros(rows, longest, top_logprobs, dtype=torch.float32, device=device)

    def run(self, eos: Tensor, generator: torch.Generator) -> Iterator[tuple[int, Completion]]:
        """Generate until every row has drawn one of ``eos`` or is full, and yield each row's number and response as it ends."""
        logits, cache, mask = self._read_prompts()
        running = torch.arange(len(self.ids), device=logits.device)  # [r] the row that each line of the model's batch continues
        for step in range(self.sampling.max_tokens):
            drawn = draw(logits, self.sampling, self.top_logprobs, generator)
            self._record(step, running, drawn)
            ended = torch.isin(drawn.ids, eos)
            new = drawn.ids
            if bool(ended.any()):  # a step that ends no row waits for the device here alone
                yield from self._completions(running[ended], step + 1, finished=True)
                kept = _without(ended)
                cache.batch_select_indices(kept)
                running, mask, new = running[kept], mask[kept], new[kept]
            if not len(running):
                return
            if step + 1 < self.sampling.max_tokens:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
                logits = self._forward(new[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
        yield from self._completions(running, self.sampling.max_tokens, finished=False)

    def _read_prompts(self) -> tuple[Tensor, DynamicCache, Tensor]:
        """Each prompt once: logits ``[R, V]`` of the first response token, the cache, and the attention mask ``[R, S]``."""
        from cppo_lightning.engines.fast_decoding import growing_cache

        width = max(len(prompt) for prompt in self.prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in self.prompts], device=self.model.device)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.model.device)
        mask = torch.arange(width, device=ids.device) >= (width - lengths)[:, None]  # left-padded
        cache = growing_cache(self.model)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp_(min=0), cache)
        cache.batch_select_indices(self.prompt_of)
        return logits[self.prompt_of], cache, mask[self.prompt_of]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits ``[r, V]`` after the last of ``ids`` ``[r, new]``."""
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]

    def _record(self, step: int, running: Tensor, drawn: Draw) -> None:
        self.ids[running, step] = drawn.ids
        self.logp[running, step] = drawn.logp
        if drawn.topk_ids is not None and drawn.topk_logp is not None:
            self.topk_ids[running, step] = drawn.topk_ids
            self.topk_logp[running, step] = drawn.topk_logp

    def _completions(self, rows: Tensor, length: int, finished: bool) -> Iterator[tuple[int, Completion]]:
        """The responses of ``rows``, all of one length."""
        tensors = [tensor[rows, :length].cpu() for tensor in (self.ids, self.logp, self.topk_ids, self.topk_logp)]
        for i, row in enumerate(rows.tolist()):
            # clones, so that a response that is kept or pickled does not bring the others along
            ids, logp, topk_ids, topk_logp = (tensor[i].clone() for tensor in tensors)
            yield row, Completion(ids, logp, finished, *((topk_ids, topk_logp) if self.top_logprobs else (None, None)))


def _without(ended: Tensor) -> Tensor:
    """Which row each remaining row comes from; rows from the end fill the places of the ``ended`` ones, so few are moved."""
    remaining = int((~ended).sum())
    source = torch.arange(remaining, device=ended.device)
    source[ended[:remaining]] = (~ended[remaining:]).nonzero()[:, 0] + remaining
    return source


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine.device must be auto or a torch device such as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device {name!r} needs a CUDA GPU, and this machine shows none; auto takes what is there")
    return device
