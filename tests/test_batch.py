from __future__ import annotations

import torch

from cppo_lightning.batch import RolloutBatch, TokenStats, micro_batches


def make_batch(prompts: list[int], responses: list[int], k: int = 3, seed: int = 0) -> RolloutBatch:
    """Random rows with the given prompt and response lengths."""
    g = torch.Generator().manual_seed(seed)
    b, s, t = len(prompts), max(prompts), max(responses)
    response_mask = torch.arange(t) < torch.tensor(responses)[:, None]
    return RolloutBatch(
        prompt_ids=torch.randint(3, 200, (b, s), generator=g),
        prompt_mask=torch.arange(s - 1, -1, -1) < torch.tensor(prompts)[:, None],
        response_ids=torch.randint(3, 200, (b, t), generator=g),
        response_mask=response_mask,
        rollout_logp=-torch.rand(b, t, generator=g) * response_mask,
        advantages=torch.randn(b, generator=g),
        rewards=torch.rand(b, generator=g),
        group=torch.arange(b),
        policy_version=torch.full((b,), 7),
        topk_ids=torch.randint(200, (b, t, k), generator=g) if k else None,
        topk_rollout_logp=-torch.rand(b, t, k, generator=g) if k else None,
        sample=torch.arange(b),
    )


def test_micro_batches_keep_every_token_and_the_budget() -> None:
    batch = make_batch([3, 9, 2, 5, 4, 1], [4, 1, 30, 8, 8, 2])
    parts = micro_batches(batch, 40)
    assert sorted(i for part in parts for i in part.group.tolist()) == list(range(6))
    for part in parts:
        assert part.prompt_mask[:, 0].any(), "cut to the longest prompt"
        assert part.response_mask[:, -1].any(), "cut to the longest response"
        for i, row in enumerate(part.group.tolist()):
            own, whole = part.response_mask[i], batch.response_mask[row]
            for name in ("response_ids", "rollout_logp", "topk_ids", "topk_rollout_logp"):
                assert torch.equal(getattr(part, name)[i][own], getattr(batch, name)[row][whole])
            assert torch.equal(part.prompt_ids[i][part.prompt_mask[i]], batch.prompt_ids[row][batch.prompt_mask[row]])
        longest = int((part.prompt_mask.sum(-1) + part.response_mask.sum(-1)).max())
        assert len(part) * longest <= 40
    assert len(micro_batches(batch, 1)) == 6
    assert len(micro_batches(batch, 10_000)) == 1
    assert micro_batches(batch.select(torch.tensor([], dtype=torch.int64)), 40) == []


def test_a_hole_in_the_mask_loses_no_token() -> None:
    batch = make_batch([3, 2], [6, 4])
    batch.response_mask[0, 2:4] = False
    part = batch.select(torch.tensor([0]))
    assert part.response_mask.tolist() == [[True, True, False, False, True, True]]


def test_blank_row_has_no_trainable_token() -> None:
    blank = make_batch([3, 2], [4, 1]).blank()
    assert len(blank) == 1
    assert int(blank.num_tokens) == 0
    assert blank.topk_ids is not None
    assert blank.topk_ids.shape == (1, 1, 3)
    assert make_batch([3], [4], k=0).blank().topk_ids is None


def test_to_moves_every_tensor() -> None:
    moved = make_batch([3, 2], [4, 1]).to("meta")
    assert {v.device.type for v in vars(moved).values()} == {"meta"}


def test_ratio_is_one_where_masked() -> None:
    mask = torch.tensor([[True, False]])
    logp = torch.tensor([[-1.0, float("nan")]])
    stats = TokenStats(torch.zeros(1, 2), logp, torch.tensor([[-1.5, 3.0]]), torch.ones(1, 2), mask)
    torch.testing.assert_close(stats.ratio, torch.tensor([[0.5, 0.0]]).exp())
