"""A model's sizes, from its configuration alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from cppo_lightning.policy_config import PolicyConfig


@dataclass(frozen=True)
class ModelShape:
    """What a policy's memory depends on; counts are of parameters, of the policy with its adapters."""

    trained: Counter[torch.dtype]  # by the dtype that they are held in
    frozen: Counter[torch.dtype]
    layer: int  # in the largest layer that FSDP2 gathers at a time
    rest: int  # in none of these: embedding, last norm, head
    layers: int
    hidden: int
    queries: int  # attention heads x their width
    keys: int  # key heads x their width
    intermediate: int  # width of the feed-forward block, over the experts that a token sees
    vocabulary: int
    head_is_trained: bool

    @classmethod
    def of(cls, config: PolicyConfig, dtype: torch.dtype | None = None) -> ModelShape:
        """Read from the configuration; no weight is loaded and none takes memory.

        Args:
            dtype: that the trainer holds the weights in, whatever ``config`` says; None for what it says.

        Raises:
            ConfigError: transformers cannot make the model as ``config`` says.
        """
        policy = without_weights(config)
        model = policy.model
        text = model.config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        experts = getattr(text, "num_experts_per_tok", None)
        of_expert = getattr(text, "moe_intermediate_size", None)
        names = set(model._no_split_modules or ())
        blocks = [_count(m.parameters()).total() for m in policy.modules() if type(m).__name__ in names]
        every = _count(policy.parameters())
        head: Any = model.get_output_embeddings()
        shape = cls(
            trained=_count(p for p in policy.parameters() if p.requires_grad),
            frozen=_count(p for p in policy.parameters() if not p.requires_grad),
            layer=max(blocks, default=0),
            rest=every.total() - sum(blocks),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries=text.num_attention_heads * width,
            keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
            intermediate=experts * of_expert
            if experts and of_expert
            else getattr(text, "intermediate_size", 4 * text.hidden_size),
            vocabulary=text.vocab_size,
            head_is_trained=head is not None and head.weight.requires_grad,
        )
        return shape.held_in(dtype or getattr(torch, config.dtype))

    @property
    def parameters(self) -> int:
        return self.trained.total() + self.frozen.total()

    def held_in(self, dtype: torch.dtype) -> ModelShape:
        """The same with every parameter in ``dtype``."""
        return replace(self, trained=Counter({dtype: self.trained.total()}), frozen=Counter({dtype: self.frozen.total()}))

    def all_frozen(self) -> ModelShape:
        """The same with nothing to train, as a reference is."""
        return replace(self, trained=Counter(), frozen=self.trained + self.frozen, head_is_trained=False)

    def cache(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of ``tokens`` tokens; less where layers look at a window only."""
        return 2 * self.layers * self.keys * tokens * dtype.itemsize


def without_weights(config: PolicyConfig) -> Policy:
    """The policy that ``config`` says, with everything on the meta device.

    Raises:
        ConfigError: transformers cannot make the model as ``config`` says.
    """
    try:
        with torch.device("meta"):
            return Policy.without_weights(config)
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # a list of all that transformers has follows
        raise ConfigError(f"model.policy: {config.path!r} cannot be made as it is set: {reason}") from error


def weight_bytes(counts: Counter[torch.dtype]) -> int:
    """Bytes of parameters by dtype."""
    return sum(count * dtype.itemsize for dtype, count in counts.items())


def _count(parameters: Iterable[nn.Parameter]) -> Counter[torch.dtype]:
    counts: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        counts[parameter.dtype] += parameter.numel()
    return counts
