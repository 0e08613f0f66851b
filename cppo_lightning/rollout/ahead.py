"""A run's rollouts in order, each drawn when it is wanted or, ahead of that, while the one before it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.ranks import on_all_ranks
from cppo_lightning.rollout.background import Background
from cppo_lightning.rollout.stream import refilled

if TYPE_CHECKING:
    from cppo_lightning.prompts.prompt_order import PromptOrder
    from cppo_lightning.rollout.sampler import Rollout
    from cppo_lightning.rollout.stream import RolloutPlan
    from cppo_lightning.verifiers.base import Problem

_STOP_SECONDS = 5.0


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
        sync: hands the policy's current weights to the engine, in the thread that trains.
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
        rollout = on_all_ranks(lambda: self._next(another))
        self.position += self._plan.prompts
        return rollout

    def wait(self) -> None:
        """Return once the engine is free: nothing is being drawn."""
        if self._ahead is not None:
            self._ahead[1].wait()

    def ready(self, seconds: float | None = None) -> Rollout | None:
        """The rollout that ``next`` would hand out without drawing; None where there is none.

        Args:
            seconds: how long to wait for one that is being drawn; None until it is there or has failed.
        """
        if self._ahead is None or self._ahead[0] != self.position:
            return None
        return self._ahead[1].outcome(seconds)

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

    def _next(self, another: bool) -> Rollout:
        if self._ahead is None:
            self._sync()
            rollout = self._draw(self.position)
        else:
            with INTERRUPTS.at_once():
                rollout = self._ahead[1].result()
            self._ahead = None
        if another and self._plan.max_staleness:
            self._sync()  # not in the thread: the policy's weights stand still here alone
            following = self.position + self._plan.prompts
            self._ahead = following, Background(lambda: self._draw(following), name="rollout ahead")
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
        """This rank's part of the ``plan.prompts`` problems that begin at ``start``."""
        order.position = start
        rank, ranks = self._ranks
        return order.take(self._plan.prompts)[rank::ranks]
