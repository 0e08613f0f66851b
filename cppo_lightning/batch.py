"""The tensors that travel: a minibatch of rollouts, what a trust region sees of it, and what it answers.

Shapes: B responses, S prompt tokens, T response tokens, K top-k entries.
Column t of every ``[B, T]`` tensor is response position t, so prefix arithmetic is a ``cumsum(-1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


@dataclass
class RolloutBatch:
    """Sampled responses with everything that the engine and the verifier said of them.

    ``policy_version`` is the number of optimizer steps the sampling weights had seen; staleness is the difference to today's.
    """

    prompt_ids: Tensor  # [B, S] int64, left-padded
    prompt_mask: Tensor  # [B, S] bool
    response_ids: Tensor  # [B, T] int64, right-padded
    response_mask: Tensor  # [B, T] bool, True on trainable tokens
    rollout_logp: Tensor  # [B, T] float32, log mu(y_t | s_t) as the engine reported it, 0 where masked
    advantages: Tensor  # [B] float32
    rewards: Tensor  # [B] float32
    group: Tensor  # [B] int64, rows of one prompt share a number
    policy_version: Tensor  # [B] int64
    topk_ids: Tensor | None = None  # [B, T, K] int64, the K most likely tokens under mu
    topk_rollout_logp: Tensor | None = None  # [B, T, K] float32
    sample: Tensor | None = None  # [B] int64, each row's place in this rank's ``Rollout.samples``

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """Trainable tokens, a scalar int64 tensor on the batch's device."""
        return self.response_mask.sum()

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if isinstance(v, torch.Tensor)}
        )

    def select(self, rows: Tensor) -> Self:
        """The given rows (int64 indices), cut to their own longest prompt and response."""
        taken = {f.name: v[rows] for f in fields(self) if (v := getattr(self, f.name)) is not None}
        prompt = int(taken["prompt_mask"].sum(-1).max()) if len(rows) else 0
        # up to the last trainable token: untrained ones may stand before it
        ends = taken["response_mask"].any(0).nonzero()
        response = int(ends[-1]) + 1 if len(ends) else 0
        for name in ("prompt_ids", "prompt_mask"):
            taken[name] = taken[name][:, taken[name].shape[1] - prompt :]
        for name in ("response_ids", "response_mask", "rollout_logp", "topk_ids", "topk_rollout_logp"):
            if name in taken:
                taken[name] = taken[name][:, :response]
        return replace(self, **taken)

    def blank(self) -> Self:
        """One row without a trainable token: a micro-batch that adds nothing but takes part in collectives."""
        row = {
            f.name: v.new_zeros((1,) * min(v.dim(), 2) + v.shape[2:])
            for f in fields(self)
            if (v := getattr(self, f.name)) is not None
        }
        row["prompt_mask"] = torch.ones_like(row["prompt_mask"])
        return replace(self, **row)

    def stats(self, logp: Tensor, topk_logp: Tensor | None) -> TokenStats:
        """What a trust region sees of it when the policy in training gives its tokens ``logp`` and ``topk_logp``, detached."""
        return TokenStats(
            response_ids=self.response_ids,
            logp=logp,
            rollout_logp=self.rollout_logp,
            advantages=self.advantages[:, None].expand_as(self.rollout_logp),
            mask=self.response_mask,
            topk_ids=self.topk_ids,
            topk_rollout_logp=self.topk_rollout_logp,
            topk_logp=topk_logp,
            sample=self.sample,
        )


@dataclass(frozen=True)
class TokenStats:
    """What a trust region may look at.  Float tensors are detached float32; values where ``mask`` is False mean nothing."""

    response_ids: Tensor  # [B, T] int64
    logp: Tensor  # [B, T] log pi(y_t | s_t) under the policy being trained
    rollout_logp: Tensor  # [B, T] log mu(y_t | s_t) under the rollout policy
    advantages: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, True on trainable tokens
    topk_ids: Tensor | None = None  # [B, T, K] int64, top-K of mu
    topk_rollout_logp: Tensor | None = None  # [B, T, K] log mu at topk_ids
    topk_logp: Tensor | None = None  # [B, T, K] log pi at topk_ids
    sample: Tensor | None = None  # [B] int64, for observers: each row's place in this rank's ``Rollout.samples``

    @property
    def ratio(self) -> Tensor:
        """rho_t = pi(y_t | s_t) / mu(y_t | s_t), ``[B, T]``, 1 where masked."""
        return (self.logp - self.rollout_logp).masked_fill(~self.mask, 0.0).exp()

    @property
    def toward(self) -> Tensor:
        """``[B, T]`` bool, whether the token's update pulls pi back to mu: A_t (rho_t - 1) <= 0; False where masked."""
        return (self.ratio - 1).mul_(self.advantages).le(0).logical_and_(self.mask)


@dataclass(frozen=True)
class Gate:
    """A trust region's answer: the gradient of token t is ``weight_t * A_t * grad log pi(y_t | s_t)``."""

    weight: Tensor  # [B, T] float32 >= 0, 0 where masked
    keep: Tensor  # [B, T] bool, False where the trust region dropped a token (and where masked)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T] or [B] each
