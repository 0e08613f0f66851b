"""float32 matrix products on x86 CPUs through oneDNN: torch's own come from MKL, which takes twice as long on those of AMD."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# of the operator that torch's compiler puts in place of nn.Linear; another version's may have other arguments
_SCHEMA = "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` of ``[..., n]`` and ``[m, n]``, through oneDNN where it can; it has no gradient there."""
    return _product(a, b, bias) if _fits(a, b, bias) else functional.linear(a, b, bias)


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` whose products, those of its gradients too, are :func:`product` where that is oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(input, self.weight, self.bias):
            return super().forward(input)
        # autograd's bookkeeping takes as long as a product of few rows, of which sampling makes thousands
        multiply = _Linear.apply if torch.is_grad_enabled() else _product
        return multiply(input, self.weight, self.bias)  # type: ignore[return-value]


def use_onednn(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` of ``model`` a :class:`OneDNNLinear`; parameters and their names stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        want_input, want_weight, want_bias = ctx.needs_input_grad
        rows, features = (torch.atleast_2d(x).flatten(0, -2) for x in (grad, input))
        return (
            product(grad, weight.t()) if want_input else None,
            product(rows.t(), features.t()) if want_weight else None,
            rows.sum(0) if want_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")


def _fits(*factors: Tensor | None) -> bool:
    """Whether oneDNN is there for these, and nothing that wants to see the product (autocast, a compiler, DTensor)."""
    return (
        not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and _available()
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
            for x in factors
            if x is not None
        )
    )


@cache
def _available() -> bool:
    # elsewhere torch's own products are fast, and this has not been measured
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator is not None and str(operator.default._schema) == _SCHEMA
