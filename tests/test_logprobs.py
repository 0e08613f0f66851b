"""Chunked log-probabilities against a float64 log-softmax over the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cppo_lightning import logprobs
from cppo_lightning.logprobs import Head, token_logprobs

N, H, V, K = 37, 16, 211, 5


def problem(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[torch.Tensor, Head, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    head = Head((torch.randn(V, H, generator=g)).to(dtype).requires_grad_())
    if bias:
        head = replace(head, bias=torch.randn(V, generator=g).to(dtype).requires_grad_())
    ids = torch.randint(V, (N,), generator=g)
    return hidden, head, ids, torch.randint(V, (N, K), generator=g)


def reference_log_softmax(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return (logits / head.temperature).log_softmax(-1)


@pytest.mark.parametrize("chunk", [V * 4, 2**24], ids=["ten chunks", "one chunk"])
@pytest.mark.parametrize(
    "change",
    [{}, {"temperature": 0.7}, {"soft_cap": 4.0, "temperature": 1.3}, {"scale": 0.25}, {"scale": 2.0, "soft_cap": 9.0}],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, change: dict[str, float], bias: bool) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    hidden, head, ids, topk_ids = problem(bias=bias)
    head = replace(head, **change)
    ours = token_logprobs(hidden, head, ids, topk_ids)
    full = reference_log_softmax(hidden, head)
    expected = full.gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.topk_logp is not None
    torch.testing.assert_close(ours.topk_logp.double(), full.gather(-1, topk_ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy.double(), -(full.exp() * full).sum(-1), rtol=1e-5, atol=1e-5)
    assert ours.logp.requires_grad
    assert not ours.topk_logp.requires_grad

    coefficients = torch.linspace(-1, 1, N)
    leaves = [hidden, head.weight, *([head.bias] if head.bias is not None else [])]
    actual = torch.autograd.grad((coefficients * ours.logp).sum(), leaves)
    wanted = torch.autograd.grad((coefficients * expected).sum(), leaves)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-5)


def test_bf16_weights_give_float32_results() -> None:
    hidden, head, ids, _ = problem(torch.bfloat16)
    ours = token_logprobs(hidden, head, ids)
    assert ours.logp.dtype == torch.float32
    assert ours.topk_logp is None
    # the inputs are bf16, the arithmetic is not: far below bf16's 2**-8
    expected = reference_log_softmax(hidden, head).gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.logp.double(), expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.logp.sum(), hidden)
    assert grad.dtype == torch.bfloat16


def test_autocast_does_not_reach_the_head() -> None:
    hidden, head, ids, _ = problem()
    plain = token_logprobs(hidden, head, ids).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = token_logprobs(hidden, head, ids).logp
        (grad,) = torch.autograd.grad(under.sum(), hidden)
    assert torch.equal(plain, under)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), hidden)[0])


def test_frozen_head_and_no_tokens() -> None:
    hidden, head, ids, topk_ids = problem()
    frozen = replace(head, weight=head.weight.detach())
    (grad,) = torch.autograd.grad(token_logprobs(hidden, frozen, ids).logp.sum(), hidden)
    (expected,) = torch.autograd.grad(token_logprobs(hidden, head, ids).logp.sum(), hidden)
    assert torch.equal(grad, expected)
    none = token_logprobs(hidden[:0], head, ids[:0], topk_ids[:0])
    (grad,) = torch.autograd.grad(none.logp.sum(), head.weight)
    assert torch.equal(grad, torch.zeros(V, H))


def test_the_whole_table_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * V)
    seen: list[int] = []
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h: seen.append(len(h)) or original(self, h))
    hidden, head, ids, topk_ids = problem()
    token_logprobs(hidden, head, ids, topk_ids).logp.sum().backward()
    assert max(seen) == 3
    assert sum(seen) == 2 * N
