"""Log-probabilities of chosen tokens straight from hidden states, a slice of the vocabulary at a time: ``[N, V]`` never exists.

Shapes: N token positions, H hidden size, V vocabulary, v tokens of one slice of it, K top-k entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from cppo_lightning.onednn import product

if TYPE_CHECKING:
    from torch import Tensor

# float32 logits of one slice: 64 MiB; on a CPU 8 MiB, which stay in its cache while softmax goes over them
CHUNK_ELEMENTS = 2**24
CPU_CHUNK_ELEMENTS = 2**21
# narrower matrix products are slow
_LEAST_COLUMNS = 256


@dataclass(frozen=True)
class TokenLogProbs:
    """All float32 at the sampling temperature; only ``logp`` carries a gradient."""

    logp: Tensor  # [N] log pi(y)
    entropy: Tensor  # [N] nats
    topk_logp: Tensor | None  # [N, K] log pi at the given ids


@dataclass(frozen=True)
class Head:
    """From hidden states to the logits that are sampled from.

    Args:
        weight: ``[V, H]`` output embedding.
        bias: ``[V]`` or None.
        temperature: sampling temperature, above 0.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)`` before the temperature (Gemma); None for none.
        scale: logits are multiplied by it first (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    soft_cap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """``[N, v]`` float32 at ``columns`` of the vocabulary, for ``[N, H]`` hidden states; after scale, cap, temperature."""
        out = _linear(hidden, self.weight[columns])
        if self.bias is not None:
            out += self.bias[columns]
        if self.scale != 1.0:
            out *= self.scale
        if self.soft_cap is not None:
            out = out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def cap_slope(self, logits: Tensor) -> Tensor | None:
        """``[N, v]`` derivative of the soft cap where it gave ``logits``; None without one."""
        if self.soft_cap is None:
            return None
        return 1 - (logits * (self.temperature / self.soft_cap)).square_()


def token_logprobs(hidden: Tensor, head: Head, ids: Tensor, topk_ids: Tensor | None = None) -> TokenLogProbs:
    """Log-probability of ``ids`` ``[N]`` (and of ``topk_ids`` ``[N, K]``) given ``hidden`` ``[N, H]``.

    Exact: float32 logits, summed over the whole vocabulary.  Gradients flow to ``hidden``, the weight and the bias.  An id that
    is not in the vocabulary gets nan.
    """
    wanted = ids[:, None] if topk_ids is None else torch.cat([ids[:, None], topk_ids], -1)
    logp, entropy, topk_logp = _TokenLogProbs.apply(hidden, head.weight, head.bias, wanted, head)  # type: ignore[misc]
    return TokenLogProbs(logp, entropy, topk_logp if topk_ids is not None else None)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps hidden states and one logsumexp per token; the backward pass makes each slice's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        softmax = _RunningSoftmax(wanted)
        for columns in _slices(hidden, weight):
            softmax.add(head.logits(hidden, columns), columns)
        lse, entropy = softmax.lse, softmax.entropy
        topk_logp = softmax.logits[:, 1:] - lse[:, None]
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, wanted[:, :1], lse)
        ctx.mark_non_differentiable(entropy, topk_logp)
        return softmax.logits[:, 0] - lse, entropy, topk_logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        head: Head = ctx.head
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_logp = grads[0][:, None] * (head.scale / head.temperature)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if want_hidden else None
        # each slice writes its part; without tokens there is none
        new = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight, grad_bias = new(weight) if want_weight else None, new(bias) if want_bias else None
        for columns in _slices(hidden, weight):
            logits = head.logits(hidden, columns)
            slope = head.cap_slope(logits)
            # d logp / d logits = onehot - softmax
            grad = logits.sub_(lse[:, None]).exp_().mul_(-grad_logp)
            place, inside = _place(ids, columns)
            grad.scatter_add_(-1, place, grad_logp * inside)
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias[columns] = grad.sum(0)
            # tensor cores take two factors of one dtype
            grad = grad.to(weight.dtype) if grad.is_cuda else grad
            if grad_hidden is not None:
                grad_hidden += _linear(grad, weight[columns].t())
            if grad_weight is not None:
                grad_weight[columns] = _linear(grad.t(), hidden.t())
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


class _RunningSoftmax:
    """What softmax over the vocabulary needs of logits that come in slices.

    Args:
        wanted: ``[N, K]`` ids whose logits are kept.
    """

    def __init__(self, wanted: Tensor) -> None:
        column = torch.zeros(len(wanted), 1, dtype=torch.float32, device=wanted.device)
        self.wanted = wanted
        self.logits = torch.full_like(wanted, torch.nan, dtype=torch.float32)  # [N, K]
        # [N, 1] each: the largest logit; over all logits, sums of w = exp(logit - largest) and of w (logit - largest)
        self._largest = torch.full_like(column, torch.finfo(torch.float32).min)
        self._sum, self._moment = column, column

    def add(self, logits: Tensor, columns: slice) -> None:
        """Take in ``[N, v]`` logits of ``columns`` of the vocabulary; overwrites them."""
        place, inside = _place(self.wanted, columns)
        self.logits = torch.where(inside, logits.gather(-1, place), self.logits)
        largest = torch.maximum(self._largest, logits.amax(-1, keepdim=True))
        shift, self._largest = self._largest - largest, largest
        weights = logits.sub_(largest).exp()
        self._moment = (self._moment + shift * self._sum) * shift.exp()
        self._sum = self._sum * shift.exp() + weights.sum(-1, keepdim=True)
        self._moment += weights.mul_(logits).sum(-1, keepdim=True)

    @property
    def lse(self) -> Tensor:
        """``[N]`` logsumexp of the logits."""
        return (self._largest + self._sum.log()).squeeze(-1)

    @property
    def entropy(self) -> Tensor:
        """``[N]`` nats."""
        return (self._sum.log() - self._moment / self._sum).squeeze(-1)


def _place(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where ids are within a slice of the vocabulary, and whether; one that is not gets some place in it."""
    local = ids - columns.start
    place = local.clamp(0, columns.stop - columns.start - 1)
    return place, place == local


def slice_width(tokens: int, size: int, on_cpu: bool) -> int:
    """v, the most tokens of the vocabulary in one slice, for hidden states ``[tokens, size]``."""
    elements = CPU_CHUNK_ELEMENTS if on_cpu else CHUNK_ELEMENTS
    return max(_LEAST_COLUMNS, elements // max(tokens, size))


def _slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the vocabulary whose logits, and whose part of the weight, are small enough to be held; none without tokens."""
    (tokens, size), vocabulary = hidden.shape, len(weight)
    step = slice_width(tokens, size, hidden.device.type == "cpu")
    return [slice(i, min(i + step, vocabulary)) for i in range(0, vocabulary if tokens else 0, step)]


def _linear(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` accumulated and returned in float32, also under autocast, which would round the product to 8 bits."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:
            same = a.dtype == b.dtype != torch.float32
            return torch.mm(a, b.t(), out_dtype=torch.float32) if same else functional.linear(a.float(), b.float())
        return product(a.float(), b.float())
