"""Log-probabilities of chosen tokens straight from hidden states, in chunks, so that ``[N, V]`` float32 never exists at once.

Shapes: N token positions, H hidden size, V vocabulary, K top-k entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

# logits of one chunk: 64 MiB of float32
CHUNK_ELEMENTS = 2**24


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

    def logits(self, hidden: Tensor) -> Tensor:
        """``[c, V]`` float32 for ``[c, H]`` hidden states, after scale, cap and temperature."""
        out = _matmul_float32(hidden, self.weight.t())
        if self.bias is not None:
            out += self.bias
        if self.scale != 1.0:
            out *= self.scale
        if self.soft_cap is not None:
            out = out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def grad_logits(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient at the raw product ``hidden @ weight.T`` from the gradient at :meth:`logits`; overwrites ``grad``."""
        if self.soft_cap is not None:
            grad *= 1 - (logits * (self.temperature / self.soft_cap)).square_()
        return grad.mul_(self.scale / self.temperature)


def token_logprobs(hidden: Tensor, head: Head, ids: Tensor, topk_ids: Tensor | None = None) -> TokenLogProbs:
    """Log-probability of ``ids`` ``[N]`` (and of ``topk_ids`` ``[N, K]``) given ``hidden`` ``[N, H]``.

    Exact: float32 logits, one logsumexp over the whole vocabulary.  Gradients flow to ``hidden``, the weight and the bias.
    """
    logp, entropy, topk_logp = _TokenLogProbs.apply(hidden, head.weight, head.bias, ids, topk_ids, head)  # type: ignore[misc]
    return TokenLogProbs(logp, entropy, topk_logp if topk_ids is not None else None)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps hidden states and one logsumexp per token; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, topk_ids: Tensor | None, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = hidden.shape[0]
        lse, logp, entropy = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
        topk_logp = hidden.new_empty((n, 0 if topk_ids is None else topk_ids.shape[-1]), dtype=torch.float32)
        for rows in _chunks(n, weight.shape[0]):
            logits = head.logits(hidden[rows])
            lse[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, ids[rows, None]).squeeze(-1) - lse[rows]
            if topk_ids is not None:
                topk_logp[rows] = logits.gather(-1, topk_ids[rows]) - lse[rows, None]
            log_pi = logits.sub_(lse[rows, None])
            entropy[rows] = -torch.linalg.vecdot(log_pi.exp(), log_pi)
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        ctx.mark_non_differentiable(entropy, topk_logp)
        return logp, entropy, topk_logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logp = grads[0]
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        head: Head = ctx.head
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # float32 sums over chunks also where the weight is bf16
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = head.logits(hidden[rows])
            # d logp / d logits = onehot - softmax
            grad = (logits - lse[rows, None]).exp_().mul_(-grad_logp[rows, None])
            grad.scatter_add_(-1, ids[rows, None], grad_logp[rows, None])
            grad = head.grad_logits(grad, logits)
            if grad_bias is not None:
                # the bias is added before the scale, as the raw product is
                grad_bias += grad.sum(0)
            cast = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul_float32(cast, weight)
            if grad_weight is not None:
                grad_weight += _matmul_float32(cast.t(), hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(n: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in float32, also under autocast, which would round the product to 8 bits."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == b.dtype == torch.float32:
            return a @ b
        if a.is_cuda and a.dtype == b.dtype:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
