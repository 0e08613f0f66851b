"""The stream of minibatches: one rollout an epoch, cut into a fixed number of optimizer updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cppo_lightning.advantages import AdvantageEstimator, has_spread
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.resume import set_generator_states
from cppo_lightning.rollout.collate import collate
from cppo_lightning.rollout.dealing import dealt
from cppo_lightning.rollout.saved import Hand

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.mismatch import RecomputedBatch
    from cppo_lightning.rollout.sampler import Rollout
    from cppo_lightning.verifiers.overlong import Overlong


@dataclass(frozen=True)
class RolloutPlan:
    """The batch arithmetic: a rollout is ``prompts * samples`` responses, trained on in ``updates * passes`` optimizer steps.

    Args:
        prompts: prompts per rollout, over all ranks.
        samples: responses to each prompt (the group size n).
        updates: optimizer steps per pass over a rollout; each gets ``prompts / updates`` prompts with all their samples.
        max_refills: how many times other prompts are drawn in place of those whose rewards are all equal (dynamic sampling,
            DAPO, arXiv 2503.14476, Eq. 11); 0 skips such prompts, as in the CPPO paper.
        max_staleness: rollouts by which the sampling weights may lag behind those of a run that samples and trains in turn;
            with 1 a rollout is drawn while the one before it is trained on, so that its samples are ``steps`` steps older.
        passes: how many times each rollout is gone through, with the same minibatches in the same order.

    Raises:
        ConfigError: a number below 1 (samples: below 2, max_refills: below 0), a max_staleness other than 0 and 1, or prompts
            that do not divide into the updates.
    """

    prompts: int = 64
    samples: int = 8
    updates: int = 2
    max_refills: int = 0
    max_staleness: int = 0
    passes: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("samples", 2), ("updates", 1), ("max_refills", 0), ("passes", 1)):
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

    @property
    def steps(self) -> int:
        """Optimizer steps per rollout."""
        return self.updates * self.passes


class RolloutStream:
    """Each pass takes one rollout and yields its ``len(stream)`` minibatches, or those that are left of a restored one.

    Groups whose rewards are all equal are skipped; the rest is dealt to the updates (``dealing.dealt``).  When fewer groups are
    left than updates, the last minibatches are empty and no step is taken on them.  What counts is the verifier's rewards,
    before ``overlong`` is added, as in DAPO's dynamic sampling: a group that is all wrong is not trained on for its lengths
    alone.

    Lightning takes it as it is: a ``DataLoader`` around it would draw from torch's global generator at each pass.  The true
    length matters: without ``__len__`` one batch is prefetched, and a prefetched rollout comes from weights that are one step
    old.

    Args:
        draw: gives the next rollout, judged.
        advantages: turns ``[P, G]`` rewards into advantages.
        updates: minibatches that a rollout is cut into.
        top_k: K of the top-K tensors, 0 for none.
        pad_id: token id that fills padding.
        overlong: added to the rewards before advantages are computed; None for nothing.
        recompute: applied to every minibatch before the first is yielded, while the weights are still those that sampled; None
            leaves them as they are.
        passes: how many times each minibatch is yielded.

    Attributes:
        hand: what the running pass yields, or the last one did; None before the first and while a rollout is drawn.
    """

    def __init__(
        self,
        draw: Callable[[], Rollout],
        advantages: AdvantageEstimator,
        updates: int,
        top_k: int,
        pad_id: int,
        overlong: Overlong | None = None,
        recompute: Callable[[RolloutBatch], RecomputedBatch] | None = None,
        passes: int = 1,
    ) -> None:
        self.draw = draw
        self.advantages = advantages
        self.updates = updates
        self.top_k = top_k
        self.pad_id = pad_id
        self.overlong = overlong
        self.recompute = recompute
        self.passes = passes
        self.hand: Hand | None = None
        self._restored = False  # whether the next pass begins with the hand
        self._generators: dict[str, Any] | None = None  # what it begins with

    def __len__(self) -> int:
        return self.updates * self.passes

    def restore(self, hand: Hand | None, generators: dict[str, Any] | None) -> None:
        """Begin the next pass with a hand's first update that has not been taken, or with a rollout if there is no hand.

        Args:
            hand: the rollout that was being trained on.
            generators: states of the random generators that the pass begins with, whatever is drawn until then.

        Raises:
            ConfigError: the hand was dealt to another number of updates, or lacks what is read of it.
        """
        if hand is not None:
            self._check(hand)
        self.hand, self._restored, self._generators = hand, hand is not None, generators

    def __iter__(self) -> Iterator[RolloutBatch]:
        if self._generators is not None:
            set_generator_states(self._generators)
            self._generators = None
        if not self._restored:
            self.hand = None  # should drawing fail, nothing is in hand
            self.hand = self._deal(self.draw())
        hand, self._restored = self.hand, False
        assert hand is not None
        for share in hand.shares[hand.trained :]:
            yield self._minibatch(hand, share, recomputed=self.recompute is not None)

    def _check(self, hand: Hand) -> None:
        """Raise :class:`ConfigError` if the rest of a hand is not what this run would train on."""
        samples, updates = hand.rollout.samples, len(hand.shares)
        widths = [0 if s.completion.topk_ids is None else s.completion.topk_ids.shape[1] for s in samples]
        columns = min(widths, default=self.top_k)  # dealt to many ranks, a hand may be empty
        trained = [samples[place] for share in hand.shares for place in _places(hand, share)]
        if updates != len(self):
            found = f"of {updates} updates, and data.plan.updates is {self.updates}, data.plan.passes {self.passes}"
            way_out = f"{updates} in all"
        elif columns < self.top_k:
            found = f"with the log-probabilities of the top {columns} tokens, and model.trust_region reads the top {self.top_k}"
            way_out = "the trust region that it was drawn for"
        elif self.recompute is not None and any(sample.old_logp is None for sample in trained):
            found, way_out = "that was not recomputed, and model.anchor is recomputed", "the anchor rollout"
        else:
            return
        raise ConfigError(
            f"the checkpoint holds the rest of a rollout {found}: go on with {way_out}, or from a checkpoint between two "
            "rollouts"
        )

    def _deal(self, rollout: Rollout) -> Hand:
        groups, rewards = rollout.groups(), reward_table(rollout)
        kept = has_spread(rewards).nonzero().flatten()
        if self.overlong is not None:
            rewards = rewards + torch.tensor([[self.overlong(len(s.completion.ids)) for s in group] for group in groups])
        tokens = {group: sum(len(s.completion.ids) for s in groups[group]) for group in kept.tolist()}
        hand = Hand(rollout, self.advantages(rewards), dealt(tokens, self.updates) * self.passes)
        return hand if self.recompute is None else self._recomputed(hand, self.recompute)

    def _recomputed(self, hand: Hand, recompute: Callable[[RolloutBatch], RecomputedBatch]) -> Hand:
        """The hand with log pi_old on every sample that is trained on."""
        samples = list(hand.rollout.samples)
        for share in hand.shares[: self.updates]:
            old_logp = recompute(self._minibatch(hand, share, recomputed=False)).old_logp
            assert old_logp is not None
            for place, row in zip(_places(hand, share), old_logp, strict=True):
                samples[place] = replace(samples[place], old_logp=row[: len(samples[place].completion.ids)])
        return replace(hand, rollout=replace(hand.rollout, samples=samples))

    def _minibatch(self, hand: Hand, share: list[int], recomputed: bool) -> RolloutBatch:
        places = _places(hand, share)
        return collate(
            [hand.rollout.samples[place] for place in places],
            hand.advantages[share].flatten().tolist(),
            places,
            hand.rollout.n,
            version=hand.rollout.version,
            top_k=self.top_k,
            pad_id=self.pad_id,
            recomputed=recomputed,
        )


def _places(hand: Hand, share: list[int]) -> list[int]:
    """Places in the rollout of the samples of some of its groups."""
    n = hand.rollout.n
    return [i * n + j for i in share for j in range(n)]


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
