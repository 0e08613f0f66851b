"""Which model is trained, and whether there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.lora import LoRA

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class PolicyConfig:
    """Which model is trained and how it is held in memory.

    Args:
        path: folder of a Hugging Face causal LM with its tokenizer, or a hub id; a leading ``~`` becomes the home folder.
        dtype: dtype of the trained weights; with ``trainer.precision: bf16-true`` they are bfloat16 in any case.
        attn_implementation: attention of transformers, for example sdpa, eager or flash_attention_2; flex_attention leaves out
            padding (in the models of ``policy.PLAIN_CAUSAL``) and needs a GPU.
        gradient_checkpointing: recompute activations in the backward pass, for less memory and more time.
        lora: train adapters like these and leave the weights of ``path`` as they are; None trains all weights.

    Raises:
        ConfigError: the folder is missing or holds no model.
    """

    path: str
    dtype: DType = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        check_model_path(self.path)

    def under(self, precision: str | int | None) -> Self:
        """This with the ``dtype`` that weights are held in under ``trainer.precision``."""
        return replace(self, dtype="bfloat16") if precision == "bf16-true" else self

    def arguments(self) -> dict[str, Any]:
        """What transformers' ``AutoModelForCausalLM`` takes to make the model, with its weights or without."""
        from transformers import AutoConfig

        architecture = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        # pi must be the distribution whose ratio to mu is taken, so nothing in it may be random
        for name, value in vars(architecture).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(architecture, name, 0.0)
        return {
            "config": architecture,
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": self.attn_implementation,
        }


def check_model_path(path: str) -> None:
    """Raise :class:`ConfigError` if ``path`` is a folder without a model, or neither a folder nor a possible hub id."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.policy.path {path!r} has no config.json; it should be a folder saved by save_pretrained")
        return
    if folder.is_file():
        raise ConfigError(f"model.policy.path {path!r} is a file; it should be the folder of a model, or a Hugging Face hub id")
    # a hub id is "owner/name" (or a bare "name"); anything longer or anchored can only be a folder
    if (
        folder.is_absolute()
        or path.startswith((".", "~"))
        or len(folder.parts) > 2
        or (folder.parent.is_dir() and folder.parent != Path())
    ):
        raise ConfigError(f"model.policy.path {path!r} does not exist; it should be a model folder or a Hugging Face hub id")
    from transformers.utils.hub import cached_file

    try:
        cached_file(path, "config.json")
    except OSError as error:
        raise ConfigError(
            f"model.policy.path {path!r} is neither a folder here nor a model that the Hugging Face hub gave: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_attention(attn_implementation: str, device: torch.device) -> None:
    """Raise :class:`ConfigError` if attention has no gradient on ``device``."""
    if attn_implementation == "flex_attention" and device.type == "cpu":
        raise ConfigError("model.policy.attn_implementation = flex_attention cannot be trained with on a CPU; take sdpa")


def check_precision(precision: str, dtype: DType) -> None:
    """Raise :class:`ConfigError` if a policy held in ``dtype`` would lose updates under ``trainer.precision``."""
    if precision.startswith("16"):
        raise ConfigError(
            f"trainer.precision = {precision} is not supported: gradients of float16 leave its range; take bf16-mixed"
        )
    if precision == "bf16-mixed" and dtype != "float32":
        raise ConfigError(
            f"model.policy.dtype = {dtype} with trainer.precision = bf16-mixed loses small updates; "
            "take model.policy.dtype float32, or trainer.precision bf16-true to do without them"
        )
