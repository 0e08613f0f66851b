"""The stream of minibatches: one rollout an epoch, cut into a fixed number of optimizer updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset

from cppo_lightning.advantages import AdvantageEstimator, has_spread
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.rollout.collate import collate

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.rollout.sampler import Rollout
    from cppo_lightning.verifiers.overlong import Overlong


@dataclass(frozen=True)
class RolloutPlan:
    """The batch arithmetic: a rollout is ``prompts * samples`` responses, trained on in ``updates`` optimizer steps.

    Args:
        prompts: prompts per rollout, over all ranks.
        samples: responses to each prompt (the group size n).
        updates: optimizer steps per rollout; each gets ``prompts / updates`` prompts with all their samples.
        max_refills: how many times other prompts are drawn in place of those whose rewards are all equal (dynamic sampling,
            DAPO, arXiv 2503.14476, Eq. 11); 0 skips such prompts, as in the CPPO paper.
        max_staleness: rollouts by which the sampling weights may lag behind those of a run that samples and trains in turn;
            with 1 a rollout is drawn while the one before it is trained on, so that its samples are ``updates`` steps older.

    Raises:
        ConfigError: a number below 1 (samples: below 2, max_refills: below 0), a max_staleness other than 0 and 1, or prompts
            that do not divide into the updates.
    """

    prompts: int = 64
    samples: int = 8
    updates: int = 2
    max_refills: int = 0
    max_staleness: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("samples", 2), ("updates", 1), ("max_refills", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.plan.{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_staleness not in (0, 1):
            raise ConfigError(
                f"data.plan.max_staleness must be 0 or 1, got {self.max_staleness}: one rollout is drawn while one is trained "
                "on, so a larger lag would make samples older and the run no faster"
            )
        if self.prompts % self.updates:
            low = self.prompts // self.updates * self.updates
            raise ConfigError(
                f"data.plan.prompts = {self.prompts} (x {self.samples} samples) does not divide into "
                f"data.plan.updates = {self.updates} updates of whole groups; "
                f"take {f'{low} or ' if low else ''}{low + self.updates} prompts"
            )


class RolloutStream(IterableDataset[RolloutBatch]):
    """Each pass takes one rollout and yields its minibatches, ``len(stream)`` of them.

    Groups whose rewards are all equal are skipped; the rest is dealt evenly to the updates.  When fewer groups are left than
    updates, the last minibatches are empty and no step is taken on them.  What counts is the verifier's rewards, before
    ``overlong`` is added, as in DAPO's dynamic sampling: a group that is all wrong is not trained on for its lengths alone.

    The true length matters: Lightning prefetches one batch of a dataset without ``__len__``, and a prefetched rollout
    comes from weights that are one step old.

    Args:
        draw: gives the next rollout, judged.
        advantages: turns ``[P, G]`` rewards into advantages.
        updates: minibatches per rollout.
        top_k: K of the top-K tensors, 0 for none.
        pad_id: token id that fills padding.
        overlong: added to the rewards before advantages are computed; None for nothing.
        recompute: applied to every minibatch before the first is yielded, while the weights are still those that sampled; None
            leaves them as they are and collates each when it is needed.
    """

    def __init__(
        self,
        draw: Callable[[], Rollout],
        advantages: AdvantageEstimator,
        updates: int,
        top_k: int,
        pad_id: int,
        overlong: Overlong | None = None,
        recompute: Callable[[RolloutBatch], RolloutBatch] | None = None,
    ) -> None:
        self.draw = draw
        self.advantages = advantages
        self.updates = updates
        self.top_k = top_k
        self.pad_id = pad_id
        self.overlong = overlong
        self.recompute = recompute

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[RolloutBatch]:
        batches = self._minibatches(self.draw())
        yield from batches if self.recompute is None else [self.recompute(batch) for batch in batches]

    def _minibatches(self, rollout: Rollout) -> Iterator[RolloutBatch]:
        groups, rewards = rollout.groups(), reward_table(rollout)
        kept = has_spread(rewards).nonzero().flatten()
        if self.overlong is not None:
            rewards = rewards + torch.tensor([[self.overlong(len(s.completion.ids)) for s in group] for group in groups])
        advantages = self.advantages(rewards)
        for share in kept.tensor_split(self.updates):
            rows = [(i, j) for i in share.tolist() for j in range(rollout.n)]
            yield collate(
                [groups[i][j] for i, j in rows],
                [float(advantages[i, j]) for i, j in rows],
                [i for i, _ in rows],
                version=rollout.version,
                top_k=self.top_k,
                pad_id=self.pad_id,
            )


def reward_table(rollout: Rollout) -> Tensor:
    """The verifier's rewards ``[P, G]`` float32, one row per group."""
    return torch.tensor([[s.verdict.reward for s in group] for group in rollout.groups()], dtype=torch.float32)


def refilled(rollout: Rollout, groups: int, max_refills: int, draw: Callable[[int, int], Rollout]) -> Rollout:
    """Draw until ``groups`` groups have rewards that differ, at most ``max_refills`` times (DAPO, arXiv 2503.14476, Eq. 11).

    Args:
        rollout: what was drawn first.
        groups: groups with a spread of rewards that are wanted.
        max_refills: bound on further draws.
        draw: given its number (from 1) and how many groups are missing, samples that many with the same weights.

    Returns:
        All draws as one rollout, groups without spread included, so that its metrics are of everything sampled.
    """
    for number in range(1, max_refills + 1):
        missing = groups - int(has_spread(reward_table(rollout)).sum())
        if missing <= 0:
            break
        more = draw(number, missing)
        rollout = replace(
            rollout,
            samples=rollout.samples + more.samples,
            seconds_sampling=rollout.seconds_sampling + more.seconds_sampling,
            seconds_verifying=rollout.seconds_verifying + more.seconds_verifying,
        )
    return rollout
