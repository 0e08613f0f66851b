"""Log-probabilities made of slices of the vocabulary against a float64 log-softmax over the whole of it."""

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


def in_slices(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """At most so many tokens of the vocabulary at a time."""
    monkeypatch.setattr(logprobs, "_LEAST_COLUMNS", columns)
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", 1)


def assert_exact(hidden: torch.Tensor, head: Head, ids: torch.Tensor, topk_ids: torch.Tensor) -> None:
    """Values to float32's precision; gradients to that of the dtype they come in."""
    ours = token_logprobs(hidden, head, ids, topk_ids)
    full = reference_log_softmax(hidden, head)
    expected = full.gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.topk_logp is not None
    torch.testing.assert_close(ours.topk_logp.double(), full.gather(-1, topk_ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy.double(), torch.special.entr(full.exp()).sum(-1), rtol=1e-5, atol=1e-5)
    assert ours.logp.dtype == ours.entropy.dtype == ours.topk_logp.dtype == torch.float32
    assert ours.logp.requires_grad
    assert not ours.topk_logp.requires_grad
    assert not ours.entropy.requires_grad

    coefficients = torch.linspace(-1, 1, N)
    leaves = [hidden, head.weight, *([head.bias] if head.bias is not None else [])]
    actual = torch.autograd.grad((coefficients * ours.logp).sum(), leaves)
    wanted = torch.autograd.grad((coefficients * expected).sum(), leaves)
    # bf16 gradients are rounded once, at the end, by us and by the reference
    rtol = 1e-4 if hidden.dtype == torch.float32 else 2**-7
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("columns", [13, 40, 10**6], ids=["17 slices", "6 slices", "one slice"])
@pytest.mark.parametrize(
    "change",
    [{}, {"temperature": 0.7}, {"soft_cap": 4.0, "temperature": 1.3}, {"scale": 0.25}, {"scale": 2.0, "soft_cap": 9.0}],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, columns: int, change: dict[str, float], bias: bool, dtype: torch.dtype
) -> None:
    in_slices(monkeypatch, columns)
    hidden, head, ids, topk_ids = problem(dtype, bias)
    assert_exact(hidden, replace(head, **change), ids, topk_ids)


def test_the_largest_logit_may_come_at_any_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits far apart, rising slice by slice for half of the tokens and falling for the others."""
    in_slices(monkeypatch, 7)
    hidden, head, ids, topk_ids = problem()
    slope = torch.tensor([-20.0, 20.0]).repeat(N)[:N, None]
    steep = torch.cat([torch.linspace(-1, 1, V)[:, None], head.weight.detach()[:, 1:]], 1).requires_grad_()
    assert_exact(torch.cat([slope, hidden.detach()[:, 1:]], 1).requires_grad_(), replace(head, weight=steep), ids, topk_ids)


def test_a_head_that_is_the_embedding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    in_slices(monkeypatch, 40)
    _, head, ids, _ = problem()

    def gradient(logp: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(logp.mean(), head.weight, retain_graph=True)[0]

    hidden = head.weight[ids.flip(0)].tanh()
    expected = gradient(reference_log_softmax(hidden, head).gather(-1, ids[:, None]))
    torch.testing.assert_close(gradient(token_logprobs(hidden, head, ids).logp), expected, rtol=1e-4, atol=1e-6)


def test_without_onednn() -> None:
    """The same numbers from torch's own products, which other machines than x86 get."""
    with torch.backends.mkldnn.flags(enabled=False):
        assert_exact(*problem())


def test_autocast_does_not_reach_the_head() -> None:
    hidden, head, ids, _ = problem()
    plain = token_logprobs(hidden, head, ids).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = token_logprobs(hidden, head, ids).logp
        gradients = torch.autograd.grad(under.sum(), [hidden, head.weight])
    assert torch.equal(plain, under)
    for under_autocast, wanted in zip(gradients, torch.autograd.grad(plain.sum(), [hidden, head.weight]), strict=True):
        assert torch.equal(under_autocast, wanted)


def test_frozen_head_and_no_tokens() -> None:
    hidden, head, ids, topk_ids = problem(bias=True)
    frozen = Head(head.weight.detach(), bias=head.bias)
    (grad,) = torch.autograd.grad(token_logprobs(hidden, frozen, ids).logp.sum(), hidden)
    (expected,) = torch.autograd.grad(token_logprobs(hidden, head, ids).logp.sum(), hidden)
    assert torch.equal(grad, expected)
    none = token_logprobs(hidden[:0], head, ids[:0], topk_ids[:0])
    assert none.topk_logp is not None
    assert (none.logp.shape, none.entropy.shape, none.topk_logp.shape) == ((0,), (0,), (0, K))
    assert head.bias is not None
    for leaf, grad in zip(
        (hidden, head.weight, head.bias), torch.autograd.grad(none.logp.sum(), [hidden, head.weight, head.bias]), strict=True
    ):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_an_id_outside_of_the_vocabulary_is_no_number() -> None:
    hidden, head, ids, topk_ids = problem()
    ids[3], topk_ids[5, 2] = V, -1
    ours = token_logprobs(hidden, head, ids, topk_ids)
    assert ours.topk_logp is not None
    assert ours.logp.isnan().nonzero().tolist() == [[3]]
    assert ours.topk_logp.isnan().nonzero().tolist() == [[5, 2]]


def test_the_reference_needs_no_gradient() -> None:
    hidden, head, ids, topk_ids = problem()
    trained = token_logprobs(hidden, head, ids, topk_ids)
    with torch.inference_mode():
        alone = token_logprobs(hidden, head, ids, topk_ids)
    assert not alone.logp.requires_grad
    assert torch.equal(alone.logp, trained.logp)
    assert torch.equal(alone.entropy, trained.entropy)


@pytest.mark.parametrize("columns", [1, 3, 50, 70])
def test_the_whole_table_never_exists(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """No slice is wider than it may be, and both passes go over each logit once."""
    monkeypatch.setattr(logprobs, "_LEAST_COLUMNS", 1)
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", columns * N)
    seen: list[torch.Size] = []
    original = Head.logits

    def logits(head: Head, hidden: torch.Tensor, columns: slice) -> torch.Tensor:
        result = original(head, hidden, columns)
        seen.append(result.shape)
        return result

    monkeypatch.setattr(Head, "logits", logits)
    hidden, head, ids, topk_ids = problem()
    token_logprobs(hidden, head, ids, topk_ids).logp.sum().backward()
    assert {shape[0] for shape in seen} == {N}
    assert max(shape[1] for shape in seen) == columns
    assert sum(shape[1] for shape in seen) == 2 * V
