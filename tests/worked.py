"""The toy responses behind ``data/vectors.json`` (vocabulary 6, K = 2) as token statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cppo_lightning.batch import TokenStats

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())

# name: (advantage, sampled ids, mu rows, pi rows)
RESPONSES: dict[str, tuple[float, list[int], list[list[float]], list[list[float]]]] = {
    "A": (
        1.0,
        [0, 3, 1, 0],
        [
            [0.50, 0.30, 0.10, 0.05, 0.03, 0.02],
            [0.55, 0.25, 0.10, 0.05, 0.03, 0.02],
            [0.20, 0.64, 0.08, 0.04, 0.03, 0.01],
            [0.70, 0.15, 0.08, 0.04, 0.02, 0.01],
        ],
        [
            [0.59, 0.23, 0.09, 0.05, 0.02, 0.02],
            [0.45, 0.31, 0.06, 0.12, 0.04, 0.02],
            [0.10, 0.80, 0.05, 0.03, 0.01, 0.01],
            [0.50, 0.30, 0.10, 0.05, 0.03, 0.02],
        ],
    ),
    "B": (
        -1.0,
        [1, 0, 0],
        [
            [0.60, 0.10, 0.15, 0.08, 0.05, 0.02],
            [0.50, 0.25, 0.12, 0.08, 0.03, 0.02],
            [0.92, 0.03, 0.02, 0.01, 0.01, 0.01],
        ],
        [
            [0.40, 0.35, 0.12, 0.06, 0.05, 0.02],
            [0.44, 0.28, 0.14, 0.08, 0.04, 0.02],
            [0.70, 0.15, 0.06, 0.04, 0.03, 0.02],
        ],
    ),
    "D": (
        1.0,
        [0, 0, 0],
        [[0.70, 0.20, 0.10], [0.50, 0.30, 0.20], [0.90, 0.06, 0.04]],
        [[0.69, 0.205, 0.105], [0.52, 0.29, 0.19], [0.88, 0.07, 0.05]],
    ),
    "E": (-1.0, [0, 1], [[0.70, 0.20, 0.10], [0.50, 0.30, 0.20]], [[0.695, 0.203, 0.102], [0.505, 0.297, 0.198]]),
}


def from_distributions(mu: torch.Tensor, pi: torch.Tensor, ids: torch.Tensor, advantage: float, k: int) -> TokenStats:
    """Statistics of one response ``[1, T]`` from full next-token distributions ``[T, V]``."""
    top = mu.argsort(descending=True, stable=True)[:, :k]
    return TokenStats(
        response_ids=ids[None],
        logp=pi.log().gather(-1, ids[:, None]).T,
        rollout_logp=mu.log().gather(-1, ids[:, None]).T,
        advantages=torch.full((1, len(ids)), advantage),
        mask=torch.ones(1, len(ids), dtype=torch.bool),
        topk_ids=top[None],
        topk_rollout_logp=mu.log().gather(-1, top)[None],
        topk_logp=pi.log().gather(-1, top)[None],
    )


def response(name: str, k: int = 2) -> TokenStats:
    """One toy response, ``[1, T]``."""
    advantage, ids, mu, pi = RESPONSES[name]
    return from_distributions(torch.tensor(mu), torch.tensor(pi), torch.tensor(ids), advantage, k)


def from_probabilities(mu: list[float], pi: list[float], advantage: float) -> TokenStats:
    """Statistics of one response from the sampled tokens' probabilities alone."""
    n = len(mu)
    return TokenStats(
        response_ids=torch.zeros(1, n, dtype=torch.int64),
        logp=torch.tensor([pi]).log(),
        rollout_logp=torch.tensor([mu]).log(),
        advantages=torch.full((1, n), advantage),
        mask=torch.ones(1, n, dtype=torch.bool),
    )


def stack(*rows: TokenStats, width: int | None = None, fill: float = -3.0) -> TokenStats:
    """Pad ``[1, T]`` statistics right to one width; padding holds ``fill``, which must not matter."""
    width = width or max(r.mask.shape[1] for r in rows)

    def padded(name: str) -> Any:
        values = [getattr(r, name) for r in rows]
        if values[0] is None:
            return None
        out = values[0].new_full((len(rows), width, *values[0].shape[2:]), 0 if not values[0].is_floating_point() else fill)
        for i, v in enumerate(values):
            out[i, : v.shape[1]] = v[0]
        return out

    names = ["response_ids", "logp", "rollout_logp", "advantages", "mask", "topk_ids", "topk_rollout_logp", "topk_logp"]
    return TokenStats(**{n: padded(n) for n in names})
