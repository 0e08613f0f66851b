"""What goes through the model together: responses behind one prompt, sequences of about one length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.policy import PLAIN_CAUSAL, Policy, PolicyConfig
from cppo_lightning.sequences import MicroBatch, Work, micro_batches
from tests.test_batch import make_batch

LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4)
WORKS = st.sampled_from([None, Work(1, 0), Work(1000, 1), Work(20, 1), Work(1, 1)])


def grouped(responses: list[list[int]], prompts: list[int] | None = None) -> RolloutBatch:
    """Random rows, those of one inner list behind the same prompt."""
    groups = [g for g, lengths in enumerate(responses) for _ in lengths]
    found = prompts or [3 + 5 * g for g in range(len(responses))]
    batch = make_batch([found[g] for g in groups], [length for lengths in responses for length in lengths])
    first = torch.tensor([groups.index(g) for g in groups])
    return replace(batch, prompt_ids=batch.prompt_ids[first], group=torch.tensor(groups))


def spent(parts: list[MicroBatch], work: Work) -> float:
    """Work without padding."""
    lengths = [int((row >= 0).sum()) for part in parts for row in part.sequences.branch]
    return sum(n * work.per_token + n**2 * work.per_pair for n in lengths)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(responses=LENGTHS, tokens=st.integers(1, 200), work=WORKS)
def test_every_token_is_there_once_behind_its_own_prompt(responses: list[list[int]], tokens: int, work: Work | None) -> None:
    batch = grouped(responses)
    parts = micro_batches(batch, tokens, work)
    assert sorted(row for part in parts for row in part.batch.sample.tolist()) == list(range(len(batch)))  # type: ignore[union-attr]
    for part in parts:
        rows, read = part.batch, part.sequences
        assert rows.prompt_mask[:, 0].any(), "cut to the longest prompt"
        assert rows.response_mask[:, -1].any(), "cut to the longest response"
        assert read.source.numel() <= tokens or len(read.source) == 1
        ids = torch.cat([rows.prompt_ids.flatten(), rows.response_ids.flatten()])[read.source]
        states = read.predicting.tolist()
        for row in range(len(rows)):
            own, prompt = rows.response_mask[row], rows.prompt_ids[row][rows.prompt_mask[row]]
            behind, states = states[: int(own.sum())], states[int(own.sum()) :]
            n, place = divmod(behind[0], read.source.shape[1])
            assert place == len(prompt) - 1
            assert torch.equal(ids[n, : len(prompt)], prompt)
            for token, state in zip(rows.response_ids[row][own], [*behind[1:], None], strict=True):
                # the token stands where the next one is predicted
                if state is not None:
                    assert ids.flatten()[state] == token
        assert not states
        for branch, positions in zip(read.branch, read.positions, strict=True):
            for number in range(1, int(branch.max()) + 1):
                seen = positions[(branch == 0) | (branch == number)]
                assert seen.tolist() == list(range(len(seen))), "as if the response were alone behind its prompt"
    if work is not None:
        assert spent(parts, work) <= spent(micro_batches(batch, tokens), work)


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


def random_model(kind: str, **settings: Any) -> Policy:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    attention = "eager" if kind in ("mamba", "bloom") else "sdpa"  # these two have no other
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation=attention)).eval()


@pytest.mark.parametrize("kind", sorted(PLAIN_CAUSAL))
def test_in_every_kind_of_model_that_may_sharing_changes_no_number(kind: str) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    policy, batch = random_model(kind, **experts), grouped([[3, 4, 1, 6]], [9])
    work = policy.work
    assert work is not None
    (part,) = micro_batches(batch, 100, work)
    assert part.sequences.branches == 4
    rows = part.batch.sample
    assert rows is not None
    with torch.no_grad():
        alone, shared = policy(batch, 1.0), policy(part.batch, 1.0, part.sequences)
    assert float(alone.logp.min()) < -1
    torch.testing.assert_close(shared.logp, alone.logp[rows], rtol=1e-5, atol=1e-5)


def test_work_counts_matrices_and_pairs() -> None:
    """Two operations with every weight but the embedding's; scores and sums of values for every head."""
    policy = random_model("llama")
    parameters = sum(p.numel() for p in policy.parameters()) - 256 * 32
    assert policy.work == Work(2.0 * parameters, 4.0 * 2 * 32)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_head": 2, "n_layer": 2}),  # positions are distances, counted along the whole sequence
        ("gemma3_text", {"sliding_window": 8}),
    ],
)
def test_models_that_pass_information_on_otherwise_share_nothing(kind: str, settings: dict[str, Any]) -> None:
    policy = random_model(kind, **settings)
    assert policy.work is None
    (part,) = micro_batches(grouped([[3, 4]], [9]), 100, policy.work)
    assert part.sequences.branches == 1


def test_a_group_of_different_prompts_is_refused() -> None:
    batch = make_batch([5, 5], [2, 2])
    with pytest.raises(ValueError, match="one group and different prompts"):
        micro_batches(replace(batch, group=torch.zeros(2, dtype=torch.int64)), 100, Work(1, 0))
