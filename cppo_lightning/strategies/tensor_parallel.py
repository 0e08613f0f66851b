"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): matrices in parts, by the plan that transformers has."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_SIZE = "trainer.strategy.tensor_parallel_size"


class Replicated(ParallelStyle):
    """Every rank has the module's parameters whole, and computes its part of the input along ``dim``, or all of it.

    The parameters are DTensors all the same: gradients' norms, optimizers and checkpoints take only one kind.

    Args:
        dim: in which ranks hold parts of the input, counted from the end; None where each has all of it.
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def before(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            first, *rest = inputs
            placement: Placement = Replicate() if self.dim is None else Shard(first.dim() + self.dim)
            return (DTensor.from_local(first, mesh, [placement], run_check=False), *rest)

        def after(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, before, after)  # type: ignore[arg-type]


def _style(name: str) -> ParallelStyle | None:
    """What transformers calls ``name``, in torch's words; None for what is not supported."""
    match name:
        case "colwise":
            return ColwiseParallel()
        case "rowwise":
            return RowwiseParallel()
        case "colwise_gather_output" | "colwise_rep":
            return ColwiseParallel(output_layouts=Replicate())
        case "embedding_rowwise":
            return RowwiseParallel(input_layouts=Replicate())
        case "replicated_with_grad_allreduce":
            return Replicated(dim=-2)  # norms of heads, of which each rank has some: ``[B, T, heads, width]``
    return None


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide ``model`` over the ranks of ``mesh``, which must then compute on the same batch.

    Embedding and output head are divided by rows of the vocabulary.  What the plan does not name is replicated.

    Raises:
        ConfigError: the model has no plan, or one with a style that is not supported, or a size that ``mesh`` does not divide.
    """
    # it advises every rank to merge collectives that it says cannot be merged
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    styles = _plan(model)
    _check_sizes(model, styles, mesh.size())
    parallelize_module(model, mesh, styles)
    model.tie_weights()  # each end of tied embeddings was given a parameter of its own


def _plan(model: PreTrainedModel) -> dict[str, ParallelStyle]:
    """The style of every module that has parameters, by name."""
    named, styles = dict(model.tp_plan), dict[str, ParallelStyle]()
    if not named:
        raise ConfigError(f"{_SIZE} is above 1, but transformers has no tensor-parallel plan for {_name(model)}; take 1")
    patterns = {re.compile(re.escape(key).replace(r"\*", r"\d+")): value for key, value in named.items()}
    for name, module in model.named_modules():
        given = next((value for pattern, value in patterns.items() if pattern.fullmatch(name)), None)
        if given is None and module is model.get_input_embeddings():
            given = "embedding_rowwise"
        if given is not None:
            style = _style(given)
        elif any(True for _ in module.parameters(recurse=False)):
            style = None if any(True for _ in module.children()) else Replicated()
        else:
            continue
        if style is None:
            what = f"has the plan {given!r}" if given else "holds parameters beside its modules"
            raise ConfigError(f"{_SIZE} is above 1, but {name} of {_name(model)} {what}, which is not supported; take 1")
        styles[name] = style
    return styles


def _check_sizes(model: PreTrainedModel, styles: Mapping[str, ParallelStyle], ranks: int) -> None:
    config = model.config.get_text_config(decoder=True)
    names = ("num_attention_heads", "num_key_value_heads")
    sizes = {name: size for name in names if (size := getattr(config, name, None)) is not None}
    for name, style in styles.items():
        if not isinstance(style, Replicated):
            module: Any = model.get_submodule(name)
            # [out, in] of a linear layer, [rows, width] of an embedding
            inputs = isinstance(style, RowwiseParallel) and isinstance(module, nn.Linear)
            sizes[f"the {'inputs' if inputs else 'rows'} of {name}"] = module.weight.shape[int(inputs)]
    for name, size in sizes.items():
        if size % ranks:
            most = math.gcd(*sizes.values())
            raise ConfigError(f"{_SIZE} = {ranks} does not divide {name} = {size} of {_name(model)}; take a divisor of {most}")


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
