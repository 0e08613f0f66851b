"""What goes through the model together: responses behind one prompt, sequences of about one length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.policy import PLAIN_CAUSAL, Policy, PolicyConfig
from cppo_lightning.policy_config import check_attention
from cppo_lightning.sequences import MicroBatch, Work, micro_batches
from cppo_lightning.sequences.cutting import PASS
from tests.test_batch import make_batch

LENGTHS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4)  # 0: all of it masked
WORKS = st.sampled_from([None, Work(1, 0), Work(1000, 1), Work(20, 1), Work(1, 1), Work(1, 0, skips_hidden=True)])


def grouped(responses: list[list[int]], prompts: list[int] | None = None) -> RolloutBatch:
    """Random rows, those of one inner list behind the same prompt."""
    groups = [g for g, lengths in enumerate(responses) for _ in lengths]
    found = prompts or [3 + 5 * g for g in range(len(responses))]
    batch = make_batch([found[g] for g in groups], [length for lengths in responses for length in lengths])
    first = torch.tensor([groups.index(g) for g in groups])
    return replace(batch, prompt_ids=batch.prompt_ids[first], group=torch.tensor(groups))


def spent(parts: list[MicroBatch], work: Work) -> float:
    """Work without padding."""
    lengths = [n for part in parts for n in part.sequences.sequence[part.sequences.branch >= 0].bincount().tolist()]
    return sum(n * work.per_token + n**2 * work.per_pair for n in lengths)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(responses=LENGTHS, tokens=st.integers(1, 200), work=WORKS)
def test_every_token_is_there_once_behind_its_own_prompt(responses: list[list[int]], tokens: int, work: Work | None) -> None:
    batch = grouped(responses)
    parts = micro_batches(batch, tokens, work)
    trained = batch.response_mask.any(-1).nonzero().flatten().tolist()
    assert sorted(row for part in parts for row in part.batch.sample.tolist()) == trained  # type: ignore[union-attr]
    for part in parts:
        rows, read = part.batch, part.sequences
        assert rows.prompt_mask[:, 0].any(), "cut to the longest prompt"
        assert rows.response_mask[:, -1].any(), "cut to the longest response"
        assert read.source.numel() <= tokens or int(read.sequence.max()) == 0
        assert read.packed == (work is not None and work.skips_hidden)
        assert not read.packed or (len(read.source) == 1 and int(read.branch.min()) == 0)
        ids = torch.cat([rows.prompt_ids.flatten(), rows.response_ids.flatten()])[read.source]
        states = read.predicting.tolist()
        for row in range(len(rows)):
            own, prompt = rows.response_mask[row], rows.prompt_ids[row][rows.prompt_mask[row]]
            behind, states = states[: int(own.sum())], states[int(own.sum()) :]
            assert read.positions.flatten()[behind[0]] == len(prompt) - 1
            assert torch.equal(ids[read.sequence == read.sequence.flatten()[behind[0]]][: len(prompt)], prompt)
            for token, state in zip(rows.response_ids[row][own], [*behind[1:], None], strict=True):
                # the token stands where the next one is predicted
                if state is not None:
                    assert ids.flatten()[state] == token
        assert not states
        for sequence in range(int(read.sequence.max()) + 1):
            branch, positions = (values[read.sequence == sequence] for values in (read.branch, read.positions))
            for number in range(1, int(branch.max()) + 1):
                seen = positions[(branch == 0) | (branch == number)]
                assert seen.tolist() == list(range(len(seen))), "as if the response were alone behind its prompt"
    if work is not None:
        assert spent(parts, work) <= spent(micro_batches(batch, tokens), work)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [items[0], *part], *rest[i + 1 :]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), tokens=st.integers(1, 300), packed=st.booleans())
def test_no_way_to_cut_costs_less(lengths: list[int], tokens: int, packed: bool) -> None:
    """Of all partitions of the rows; a part costs its tokens with padding, and what a pass costs besides.  Packed rows stay
    in their order, for the tensors about their tokens."""
    batch = make_batch([1] * len(lengths), [n - 1 for n in lengths])
    lengths = [n for n in lengths if n > 1]  # rows without a trainable token are left out
    parts = micro_batches(batch, tokens, Work(1, 0, skips_hidden=True) if packed else None)
    found = [part.sequences.source.numel() for part in parts]
    assert found == sorted(found, reverse=True), "ranks wait least if they begin with what takes longest"
    if packed:
        assert sum(found) == sum(lengths)
        assert all(n <= tokens or len(part.batch) == 1 for n, part in zip(found, parts, strict=True))
        return

    def padded(part: list[int]) -> int:
        return len(part) * max(part)

    ways = [way for way in partitions(lengths) if all(padded(part) <= tokens or len(part) == 1 for part in way)]
    cheapest = min(sum(map(padded, way)) + PASS * tokens * len(way) for way in ways)
    assert sum(found) + PASS * tokens * len(found) == pytest.approx(cheapest)


def test_a_long_response_is_not_packed_with_many_short_ones() -> None:
    """Divergences and masks are of [B, T], and with top-K of [B, T, K]: there the short ones are as long as the longest."""
    batch = make_batch([1] * 200, [600] + [2] * 199)
    parts = micro_batches(batch, 1300, Work(1, 0, skips_hidden=True))
    assert [part.sequences.source.numel() for part in parts] == [601, 199 * 3]


def test_short_responses_share_and_long_ones_do_not() -> None:
    work = Work(per_token=1000, per_pair=1)
    (part,) = micro_batches(grouped([[4] * 8], [50]), 10_000, work)
    assert part.sequences.source.shape == (1, 50 + 8 * 4)
    (part,) = micro_batches(grouped([[400] * 8], [50]), 10_000, work)
    assert part.sequences.source.shape == (8, 450)
    first, *_, last = micro_batches(grouped([[4] * 8], [50]), 60, work)
    assert (first.sequences.branches, last.sequences.branches) == (2, 2), "not beyond a micro-batch"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sharing_changes_no_number(tiny_model_path: Path, attention: str) -> None:
    """Log-probabilities and gradients against each row by itself, holes in the masks included."""
    policy = Policy.load(PolicyConfig(str(tiny_model_path), attn_implementation=attention))
    batch = grouped([[3, 4, 1, 6], [2, 8, 5, 5]], [7, 5])
    batch.response_mask[3, 2] = False
    alone = policy(batch, 0.7)
    weights = torch.rand(alone.logp.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(policy, (weights * alone.logp).sum())
    parts = micro_batches(batch, 30, policy.work)
    assert len(parts) == 2
    assert {part.sequences.branches for part in parts} == {4}
    found = [policy(part.batch, 0.7, part.sequences) for part in parts]
    total = torch.zeros(())
    for part, output in zip(parts, found, strict=True):
        rows = part.batch.sample
        assert rows is not None
        width = output.logp.shape[1]
        for name in ("logp", "entropy", "topk_logp"):
            torch.testing.assert_close(getattr(output, name), getattr(alone, name)[rows, :width], rtol=1e-5, atol=1e-5)
        total = total + (weights[rows, :width] * output.logp).sum()
    for ours, theirs in zip(gradients(policy, total), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def gradients(policy: Policy, value: Tensor) -> list[Tensor]:
    policy.zero_grad()
    value.backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256},
    **{"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "sliding_window": None},
}


def random_model(kind: str, attention: str = "sdpa", **settings: Any) -> Policy:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    attention = "eager" if kind in ("mamba", "bloom") else attention  # these two have no other
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation=attention)).eval()


@pytest.mark.parametrize("kind", sorted(PLAIN_CAUSAL))
def test_in_every_kind_of_model_that_may_sharing_changes_no_number(kind: str) -> None:
    experts: dict[str, Any] = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    )
    policy, batch = random_model(kind, **experts), grouped([[3, 4, 1, 6]], [9])
    work = policy.work
    assert work is not None
    (part,) = micro_batches(batch, 100, work)
    assert part.sequences.branches == 4
    rows = part.batch.sample
    assert rows is not None
    with torch.no_grad():
        with seen_by_sdpa() as calls:
            alone = policy(batch, 1.0)
        shared = policy(part.batch, 1.0, part.sequences)
    assert calls == [(None, True)] * 2, "two layers, no mask of [N, 1, L, L] where plain causal attention is right"
    assert float(alone.logp.min()) < -1
    torch.testing.assert_close(shared.logp, alone.logp[rows], rtol=1e-5, atol=1e-5)


@contextmanager
def seen_by_sdpa() -> Iterator[list[tuple[Tensor | None, bool]]]:
    """Mask and ``is_causal`` of every call."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Tensor:
        calls.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", noted):
        yield calls


@pytest.mark.parametrize("autocast", [True, False])
def test_layers_read_one_mask(autocast: bool) -> None:
    """In the dtype that they compute in: a mask of another is cast in each layer, which keeps it for the backward pass."""
    policy = random_model("qwen3")
    (part,) = micro_batches(grouped([[3, 4]], [9]), 100, policy.work)
    with seen_by_sdpa() as calls, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy(part.batch, 1.0, part.sequences)
    (first, _), (second, _) = calls
    assert first is second
    assert first is not None
    assert first.dtype == (torch.bfloat16 if autocast else torch.float32)


@contextmanager
def flex_on_a_cpu() -> Iterator[None]:
    """Flex attention by its definition, with gradients; compiled it has none on a CPU."""
    with patch.object(flex_attention, "_validate_device", lambda *_: None), torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packing_changes_no_number(kind: str) -> None:
    """Log-probabilities and gradients of sequences in one row against each row by itself, branched prompts included."""
    policy, packing = random_model(kind), random_model(kind, "flex_attention")
    assert policy.work is not None
    assert packing.work == replace(policy.work, skips_hidden=True)
    batch = grouped([[3, 4, 1], [70], [2, 90]], [9, 80, 5])
    alone = policy(batch, 1.0)
    weights = torch.rand(alone.logp.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(policy, (weights * alone.logp).sum())
    total = torch.zeros(())
    with flex_on_a_cpu():
        parts = micro_batches(batch, 260, packing.work)
        assert [len(part.sequences.source) for part in parts] == [1] * 2
        assert max(part.sequences.branches for part in parts) == 3
        for part in parts:
            output, rows = packing(part.batch, 1.0, part.sequences), part.batch.sample
            assert rows is not None
            width = output.logp.shape[1]
            torch.testing.assert_close(output.logp, alone.logp[rows, :width], rtol=1e-5, atol=1e-5)
            total = total + (weights[rows, :width] * output.logp).sum()
        found = gradients(packing, total)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_block_mask_leaves_out_what_no_token_sees() -> None:
    """Three sequences of 256 tokens: of each, one block of 128 tokens sees itself, and one itself and the one before it."""
    (part,) = micro_batches(grouped([[128], [128], [128]], [128] * 3), 1000, Work(1, 0, skips_hidden=True))
    mask: Any = part.sequences.attention_mask(torch.float32)
    assert mask.shape == (1, 1, 768, 768)
    assert mask.to_dense()[0, 0].nonzero().tolist() == [[q, k] for q in range(6) for k in range(q // 2 * 2, q + 1)]


def test_attention_without_a_gradient_is_refused() -> None:
    check_attention("flex_attention", torch.device("cuda"))
    check_attention("sdpa", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model\.policy\.attn_implementation = flex_attention .* take sdpa"):
        check_attention("flex_attention", torch.device("cpu"))


def test_work_counts_matrices_and_pairs() -> None:
    """Two operations with every weight but the embedding's; scores and sums of values for every head."""
    policy = random_model("llama")
    parameters = sum(p.numel() for p in policy.parameters()) - 256 * 32
    assert policy.work == Work(2.0 * parameters, 4.0 * 2 * 32)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_positions_that_turn_by_the_longest_sequence_are_those_of_a_response_alone(kind: str) -> None:
    """No response reaches the context of 24 tokens, where such positions begin to change; padding behind four of them would."""
    policy = random_model(kind, rope_parameters=DYNAMIC, max_position_embeddings=24)
    batch = grouped([[9] * 4, [8] * 4], [14, 14])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # else attention hardly looks at positions
        alone = policy(batch, 1.0).logp
        parts = micro_batches(batch, 200, policy.work)
        found = [policy(part.batch, 1.0, part.sequences).logp for part in parts]
    for part, logp in zip(parts, found, strict=True):
        rows = part.batch.sample
        assert rows is not None
        torch.testing.assert_close(logp, alone[rows, : logp.shape[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_head": 2, "n_layer": 2}),  # positions are distances, counted along the whole sequence
        ("gemma3_text", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 8, "attention": "flex_attention"}),
        ("llama", {"rope_parameters": DYNAMIC}),
        ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 64, "original_max_position_embeddings": 16}),
    ],
)
def test_models_that_pass_information_on_otherwise_share_nothing(kind: str, settings: dict[str, Any]) -> None:
    policy = random_model(kind, **settings)
    assert policy.work is None
    (part,) = micro_batches(grouped([[3, 4]], [9]), 100, policy.work)
    assert part.sequences.branches == 1
    assert not part.sequences.packed


def test_a_group_of_different_prompts_is_refused() -> None:
    batch = make_batch([5, 5], [2, 2])
    with pytest.raises(ValueError, match="one group and different prompts"):
        micro_batches(replace(batch, group=torch.zeros(2, dtype=torch.int64)), 100, Work(1, 0))
