"""The policy: a Hugging Face causal LM that answers with log-probabilities of a rollout's tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cppo_lightning.errors import ConfigError
from cppo_lightning.logprobs import Head, token_logprobs
from cppo_lightning.lora import IS_ADAPTER, added_by_adapters
from cppo_lightning.onednn import use_onednn
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.sequences import Sequences, Work

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cppo_lightning.batch import RolloutBatch


# model types in which a response behind a branched prompt is what it is alone; tests hold each of them to it
PLAIN_CAUSAL = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"})


@dataclass(frozen=True)
class ResponseLogProbs:
    """What the policy says of a rollout's tokens; float32, only ``logp`` carries a gradient, 0 where masked."""

    logp: Tensor  # [B, T]
    entropy: Tensor  # [B, T] nats
    topk_logp: Tensor | None  # [B, T, K]


class Policy(nn.Module):
    """A causal LM whose forward pass gives log-probabilities of response tokens, never the logits.

    Hidden states and output head are used inside one forward, so that sharding wrappers which gather parameters per
    module keep working.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Load the weights of ``config.path``.  Code that ships with a model is never run.

        Raises:
            ConfigError: weights are missing or of another shape, or the model's head, or a target of ``config.lora``, is not as
                it would have to be.
        """
        from transformers import AutoModelForCausalLM

        # with sizes that do not match ignored, they are told as missing ones are
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **config.arguments()
        )
        model, info = loaded
        _check_loaded(config.path, info)
        policy = cls._with(model, config)
        policy.check_head()
        return policy

    @classmethod
    def without_weights(cls, config: PolicyConfig) -> Policy:
        """The same model with its parameters on the meta device, where they take no memory; buffers are what they should be."""
        from transformers import AutoModelForCausalLM

        with _parameters_on_meta():
            return cls._with(AutoModelForCausalLM.from_config(trust_remote_code=False, **config.arguments()), config)

    @classmethod
    def _with(cls, model: PreTrainedModel, config: PolicyConfig) -> Policy:
        if config.lora is not None:
            config.lora.add_to(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        use_onednn(model)
        # training mode is what gradient checkpointing asks for; with dropout off it is the same function
        return cls(model).train()

    def forward(self, batch: RolloutBatch, temperature: float, sequences: Sequences | None = None) -> ResponseLogProbs:
        """Log-probabilities of ``batch``'s response tokens at ``temperature``, and of its top-K ids if it carries them.

        ``sequences`` is what the model reads; None is each row by itself.
        """
        read = Sequences.of(batch) if sequences is None else sequences
        hidden = self.model.base_model(
            input_ids=torch.cat([batch.prompt_ids.flatten(), batch.response_ids.flatten()])[read.source],
            attention_mask=read.attention_mask(self._computes_in()),
            position_ids=read.positions,
            use_cache=False,
        ).last_hidden_state
        flat = token_logprobs(
            hidden.flatten(0, 1)[read.predicting],
            output_head(self.model, temperature),
            batch.response_ids.flatten()[read.trained],
            None if batch.topk_ids is None else batch.topk_ids.flatten(0, 1)[read.trained],
        )

        def by_row(values: Tensor) -> Tensor:
            shape = batch.response_mask.shape
            out = values.new_zeros(shape.numel(), *values.shape[1:]).index_copy(0, read.trained, values)
            return out.view(*shape, *values.shape[1:])

        return ResponseLogProbs(
            # FSDP2 hooks into what has a gradient, and an operation in place on a view would undo that
            logp=by_row(flat.logp).clone(),
            entropy=by_row(flat.entropy),
            topk_logp=None if flat.topk_logp is None else by_row(flat.topk_logp),
        )

    def _computes_in(self) -> torch.dtype:
        device = self.model.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    @cached_property
    def work(self) -> Work | None:
        """Of a forward pass; None if no two responses can share a sequence, nor two sequences a row: nothing but full causal
        attention over rotated positions may pass information on, which is known of :data:`PLAIN_CAUSAL` alone."""
        config = self.model.config.get_text_config(decoder=True)
        if config.model_type not in PLAIN_CAUSAL:
            return None
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        attentions = ("sdpa", "eager", "flex_attention")
        # the largest position decides how these turn each of them, and padding behind several branches has larger ones
        by_length = (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope")
        windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if set(kinds) != {"full_attention"} or windows or by_length or config._attn_implementation not in attentions:
            return None
        embedding: Any = self.model.get_input_embeddings()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Work(
            per_token=2.0 * (sum(p.numel() for p in self.model.parameters()) - embedding.weight.numel()),
            per_pair=4.0 * config.num_hidden_layers * config.num_attention_heads * size,
            skips_hidden=config._attn_implementation == "flex_attention",
        )

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their Hugging Face names, whole and detached; tied ones once.

        FSDP2's shards are gathered when their parameter's turn comes, and nothing here keeps the one before, so a consumer that
        lets go of it holds one whole parameter at a time.  Every rank must go through all of them; their order is the same on
        each.  What a LoRA adapter of peft (as ``model.add_adapter`` makes it) adds to a weight is in it.

        Raises:
            ConfigError: tied embeddings are not one parameter any more, or an adapter is no plain LoRA.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else, after a forward pass, some are held whole, and in the dtype that it computes in
        _check_tied(self.model)
        for name, parameter in self.model.named_parameters():
            if not IS_ADAPTER.search(name):
                # not through a variable, which would keep it while the next is gathered
                yield file_name(name), _whole(self.model, name, parameter)

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare our head with the model's own logits on two tokens: an architecture that treats logits in a way unknown here
        would train on wrong log-probabilities without any other sign.

        Raises:
            ConfigError: they differ.
        """
        model, was_training = self.model, self.model.training
        model.eval()
        ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = output_head(model).logits(hidden)
        model.train(was_training)
        gap, scale = float((own - ours).abs().max()), float(own.abs().max())
        # bf16 heads round logits to 8 bits; a missed scale or cap is far larger, and a gap that is nan is none
        if not gap <= 0.02 * max(scale, 1e-3) or math.isinf(scale):
            raise ConfigError(
                f"{type(model).__name__} changes logits after its output head in a way that is not supported "
                f"(largest difference {gap:.3g} at logits up to {scale:.3g}); its log-probabilities would be wrong"
            )


def _check_loaded(path: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which parts would be random, of which transformers only warns."""
    missing = sorted(info["missing_keys"])
    misshapen = [f"{name} {[*found]} instead of {[*wanted]}" for name, found, wanted in sorted(info["mismatched_keys"])]
    for what, names in (("lacks", missing), ("has of another shape than its config.json says", misshapen)):
        if names:
            rest = ", ..." if len(names) > 3 else ""
            raise ConfigError(
                f"model.policy.path {path!r} {what} {len(names)} of its weights ({', '.join(names[:3])}{rest}); they would "
                "be random: download or save the model again"
            )


def output_head(model: PreTrainedModel, temperature: float = 1.0) -> Head:
    """The model's output head, with what some architectures do to logits after it."""
    config, output = model.config, model.get_output_embeddings()
    if output is None:
        raise ConfigError(
            f"{type(model).__name__} has no output embedding; model.policy.path must hold a causal language model"
        )
    bias = getattr(output, "bias", None)
    return Head(
        weight=_gathered(output.weight),
        bias=None if bias is None else _gathered(bias),
        temperature=temperature,
        soft_cap=getattr(config, "final_logit_softcapping", None),
        scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
    )


def _gathered(parameter: Tensor) -> Tensor:
    """A parameter of which ranks of one tensor-parallel group hold parts, whole; its gradient goes back to the parts."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


# parts of parameters' names that torch.compile, activation checkpointing and peft put in
_WRAPPER = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|base_layer)\.")


def file_name(name: str) -> str:
    """The name that a model's parameter ``name`` has in its folder, whatever wraps the modules here."""
    return _WRAPPER.sub("", name)


@torch.no_grad()
def _whole(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """One parameter, with what LoRA adapters add to it, gathered from its shards."""
    value = parameter.detach()
    owner = name.removesuffix(".base_layer.weight")
    if owner != name:
        for delta in added_by_adapters(model.get_submodule(owner), owner):
            value = value + delta
    return _gathered(value)


def _check_tied(model: PreTrainedModel) -> None:
    """Refuse tied embeddings that were parted: engines hold one tensor for both, and would get two."""
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    both: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if both[0].weight is not both[1].weight or any(hasattr(module, "base_layer") for module in both):
        raise ConfigError(
            "the model ties its output head to its input embedding (tie_word_embeddings in its config.json), but here they are "
            "two: leave both out of adapters, shard them in one group of fully_shard (the root's), or say false there"
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device.  Not so buffers, which no checkpoint holds."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is has been tied to another module's
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
