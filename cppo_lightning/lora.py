"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): a few trained parameters beside weights that stay."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# adapters' parameters, as peft names them
IS_ADAPTER = re.compile(r"\.lora_([AB]\.[^.]+\.weight|embedding_[AB]\.[^.]+)$")


@dataclass(frozen=True)
class LoRA:
    """Adapters of peft, without dropout, since nothing in pi may be random.

    Args:
        rank: of the product B A that is added to a weight.
        alpha: the product is scaled by ``alpha / rank``.
        targets: names of the modules that get an adapter, such as ``[q_proj, v_proj]``; ``all-linear`` for all but the head.
        seed: of the initial A (B begins at 0).

    Raises:
        ConfigError: a rank below 1, or peft is not installed.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.policy.lora.rank must be at least 1, got {self.rank}")
        if find_spec("peft") is None:
            raise ConfigError('model.policy.lora needs peft, which is not installed: pip install "cppo-lightning[lora]"')

    def add_to(self, model: PreTrainedModel) -> None:
        """Put adapters into ``model`` and freeze everything else.

        Raises:
            ConfigError: the model has none of the targets.
        """
        from peft import LoraConfig

        try:
            model.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets))  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"model.policy.lora.targets {self.targets!r}: {error}") from error
        for name, parameter in model.named_parameters():
            if not IS_ADAPTER.search(name):
                continue
            # peft does so beside real weights and not beside those on the meta device, and FSDP2 shards one dtype together
            parameter.data = parameter.data.to(model.dtype)
            if not parameter.is_meta:
                parameter.data.copy_(self.initial(name, parameter.shape))

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """The float32 values that adapter parameter ``name`` begins with, which depend on nothing but it and the seed.

        Those of peft: for weights A uniform in +-1/sqrt(inputs) and B 0, for embeddings A 0 and B normal.
        """
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        values = torch.zeros(shape)
        if ".lora_A." in name:
            return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        return values.normal_(generator=generator) if ".lora_embedding_B." in name else values


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Forward passes inside are those of ``model`` as it was before :meth:`LoRA.add_to`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
    # peft's own switch freezes the adapters meanwhile, behind the back of what shards them
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def added_by_adapters(layer: Any, owner: str) -> Iterator[Tensor]:
    """What each active adapter of peft's ``layer`` adds to its weight; nothing where they are merged or switched off.

    Raises:
        ConfigError: an adapter is no plain LoRA.
    """
    if layer.merged or layer.disable_adapters:
        return
    if not hasattr(layer, "lora_A") or any(getattr(layer, "lora_variant", {}).values()):
        raise ConfigError(f"{owner} has an adapter other than a plain LoRA (DoRA is another), and engines take only that")
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            yield layer.get_delta_weight(adapter)
