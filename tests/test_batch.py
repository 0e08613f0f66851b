from __future__ import annotations

import torch

from cppo_lightning.batch import RolloutBatch, TokenStats


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
