"""A run's rollouts in order, each drawn when it is wanted or, ahead of that, while the one before it is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.ranks import on_all_ranks, on_every_rank
from cppo_lightning.rollout.background import Background
from cppo_lightning.rollout.stream import refilled

if TYPE_CHECKING:
    from cppo_lightning.prompts.prompt_order import PromptOrder
    from cppo_lightning.rollout.sampler import Rollout
    from cppo_lightning.rollout.stream import RolloutPlan
    from cppo_lightning.verifiers.base import Problem

_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.1


class TrainingRollouts:
    """Hands out the rollouts that a run trains on.

    With ``plan.max_staleness`` 1, all but the first are drawn in a thread while the one before is trained on, with the weights
    that its training began with.  When a thread is done changes nothing, so a run is as reproducible as without.

    ``position`` counts the problems handed out, those of all ranks, and with the rollout that is ready it is all the state
    there is.  It moves when a rollout is there and handed out: one that fails is drawn again by a run that is resumed.

    Args:
        order: the problems.
        refills: the same problems in another order.
        plan: sizes, and whether to draw ahead.
        ranks: this rank's number, and how many there are.
        sync: hands the policy's current weights to the engine, in the thread that trains, on all ranks and with nothing being
            drawn on any: ranks may share servers, and what hands over may be a collective.
        sample: draws and judges responses to problems, with a seed.
        seed: the seed for a purpose.
    """

    def __init__(
        self,
        order: PromptOrder,
        refills: PromptOrder,
        plan: RolloutPlan,
        ranks: tuple[int, int],
        sync: Callable[[], None],
        sample: Callable[[list[Problem], int], Rollout],
        seed: Callable[..., int],
    ) -> None:
        self.position = 0
        self._order = order
        self._refills = refills
        self._plan = plan
        self._ranks = ranks
        self._sync = sync
        self._sample = sample
        self._seed = seed
        self._ahead: tuple[int, Background[Rollout]] | None = None  # the position that it is drawn for

    def next(self, another: bool) -> Rollout:
        """The next rollout; every rank must call it.

        Args:
            another: whether one more is wanted after it, and may be drawn ahead.

        Raises:
            RolloutError: it could not be drawn, or the one after it not be begun; ``position`` stays.
        """
        # ranks agree before each sync: one that has failed, or has a rollout when another has none, would miss its collectives
        rollout = on_all_ranks(self._take)
        if not all(on_every_rank(rollout is not None)):
            on_all_ranks(self._sync)
            rollout = on_all_ranks(lambda: self._draw(self.position))
        assert rollout is not None
        following = self.position + self._plan.prompts
        if another and self._plan.max_staleness:
            on_all_ranks(self._sync)  # not in the thread: the policy's weights stand still here alone
            self._ahead = following, Background(lambda: self._draw(following), name="rollout ahead")
        self.position = following
        return rollout

    def wait(self) -> None:
        """Return once this rank's engine is free: nothing is being drawn.  Signals end it at once."""
        if self._ahead is not None:
            with INTERRUPTS.at_once():
                self._ahead[1].wait()

    def ready(self, seconds: float) -> Rollout | None:
        """The rollout that ``next`` would hand out without drawing; None where there is none.

        Args:
            seconds: how long to wait for one that is being drawn and has not failed; a signal that is deferred ends the wait.
        """
        if self._ahead is None or self._ahead[0] != self.position:
            return None
        ahead, until = self._ahead[1], time.monotonic() + seconds
        while not ahead.wait(_POLL_SECONDS) and time.monotonic() < until:
            if INTERRUPTS.deferred and INTERRUPTS.received is not None:
                break
        return ahead.outcome()

    def restore(self, position: int, ready: Rollout | None) -> None:
        """Go on where a run with this ``position`` and this rollout ``ready`` ended; without staleness it is drawn again."""
        self.stop()
        self.position = position
        if ready is not None and self._plan.max_staleness:
            self._ahead = position, Background(lambda: ready, name="rollout restored")

    def stop(self) -> None:
        """End what is being drawn ahead, which takes seconds at most, and forget it."""
        if self._ahead is not None and self._ahead[1].stop(_STOP_SECONDS):
            self._ahead = None

    def _take(self) -> Rollout | None:
        """The rollout ahead, once it is there, which is forgotten here; None where none was begun."""
        if self._ahead is None:
            return None
        with INTERRUPTS.at_once():
            rollout = self._ahead[1].result()
        self._ahead = None
        return rollout

    def _draw(self, start: int) -> Rollout:
        """The rollout whose problems begin at ``start``, with the engine's weights."""
        problems = self._share(self._order, start)

        def refill(number: int, missing: int) -> Rollout:
            # Every refill has a place of its own in the second shuffle, used or not: ranks decide by themselves when they have
            # enough, and a resumed run needs to know the first shuffle's position alone.
            place = start * self._plan.max_refills + (number - 1) * self._plan.prompts
            return self._sample(self._share(self._refills, place)[:missing], self._seed("refill", start, number))

        rollout = self._sample(problems, self._seed("train", start))
        return refilled(rollout, len(problems), self._plan.max_refills, refill)

    def _share(self, order: PromptOrder, start: int) -> list[Problem]:
        """This rank's part of the ``plan.prompts`` problems that begin at ``start``: neighbours, for a mixture's shares hold
        among them, while of every nth some rank may get one set alone."""
        rank, ranks = self._ranks
        part = self._plan.prompts // ranks
        order.position = start + rank * part
        return order.take(part)
