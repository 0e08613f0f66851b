"""What all engines settle alike: dtypes, possible requests, where responses end, their order, complete weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import nn

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.policy_config import DType

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig

    from cppo_lightning.engines.engine import Completion, OnCompletion, Sampling


def check_dtype(dtype: str) -> None:
    """Raise :class:`ConfigError` unless ``dtype`` is one that a policy may have too."""
    if dtype not in get_args(DType):
        raise ConfigError(f"engine.dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}")


def read_config(model: str) -> PretrainedConfig:
    """The configuration of ``model``, a folder or hub id.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model!r} should be a folder or hub id of a Hugging Face causal LM: {error}") from error


def generation_config(model: str, config: PretrainedConfig) -> GenerationConfig:
    """What ``model`` comes with, else what follows from its ``config``."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # a folder without generation_config.json is in order
        return GenerationConfig.from_model_config(config)


def eos_token_ids(model: str, config: PretrainedConfig) -> list[int]:
    """Every token that ends a response: those of the generation config (else of the config) and the tokenizer's.

    Raises:
        ConfigError: the model has no tokenizer, or no such token.
    """
    from transformers import AutoTokenizer

    generation = generation_config(model, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model!r} should come with its tokenizer: {error}") from error
    ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    found = sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})
    if not found:
        raise ConfigError(f"model {model!r} should name an eos_token_id in generation_config.json: no response would end")
    return found


def check_request(
    config: PretrainedConfig,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    top_logprobs: int,
    context: int | None = None,
) -> None:
    """Refuse what the model cannot do; ``context`` is a limit on prompt and response below the model's own.

    Raises:
        ConfigError: n or top_logprobs is out of range, or a prompt leaves no room for ``max_tokens`` in the model's context.
        RolloutError: a prompt is empty.
    """
    text = config.get_text_config(decoder=True)
    if n < 1:
        raise ConfigError(f"n, the number of samples per prompt, must be at least 1, got {n}")
    if not 0 <= top_logprobs <= text.vocab_size:
        raise ConfigError(f"top_logprobs must be between 0 and the vocabulary's {text.vocab_size} tokens, got {top_logprobs}")
    room = context or getattr(text, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise RolloutError(f"prompt {i} of {len(prompts)} has no tokens")
        if room is not None and len(prompt) + sampling.max_tokens > room:
            raise ConfigError(
                f"sampling.max_tokens {sampling.max_tokens} with a prompt of {len(prompt)} tokens exceeds the context of"
                f" {room}: it should be at most {room - len(prompt)}, or the prompt shorter"
            )


class Completions:
    """Gathers ``count`` completions in the order of their places, and hands each on as it comes."""

    def __init__(self, count: int, on_completion: OnCompletion | None) -> None:
        self._places: list[Completion | None] = [None] * count
        self._on_completion = on_completion

    def add(self, place: int, completion: Completion) -> None:
        self._places[place] = completion
        if self._on_completion is not None:
            self._on_completion(place, completion)

    def all(self) -> list[Completion]:
        """Every completion, in order.

        Raises:
            RolloutError: one has not come.
        """
        there = [completion for completion in self._places if completion is not None]
        if len(there) < len(self._places):
            raise RolloutError(f"the engine answered {len(there)} of {len(self._places)} samples")
        return there


def meta_parameters(config: PretrainedConfig) -> dict[str, Tensor]:
    """The model's parameters and buffers by Hugging Face name, without memory; tied names share one parameter."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict(keep_vars=True)


def checked_weights(weights: Iterable[tuple[str, Tensor]], parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pass ``weights`` on, each compared with ``parameters``, a ``state_dict(keep_vars=True)``; of tied names one is enough.

    Raises:
        RolloutError: a name is unknown, a shape differs, or at the end a parameter was missing.
    """
    taken: set[int] = set()
    for name, tensor in weights:
        own = parameters.get(name)
        if own is None:
            raise RolloutError(f"load_weights: the sampling model has no parameter {name!r}")
        if own.shape != tensor.shape:
            raise RolloutError(f"load_weights: {name!r} is {list(own.shape)} in the sampling model, got {list(tensor.shape)}")
        taken.add(id(own))
        tensor = tensor.detach()
        yield name, tensor
        del tensor  # two whole parameters would be held otherwise, this one while the next is gathered
    left = {id(p): name for name, p in parameters.items() if isinstance(p, nn.Parameter) and id(p) not in taken}
    if left:
        names = sorted(left.values())
        raise RolloutError(f"load_weights: missing {len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
