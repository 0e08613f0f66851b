"""Where a run is in its problems and rollouts, of all ranks, for its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.ranks import on_rank_zero
from cppo_lightning.resume import generator_states
from cppo_lightning.rollout.saved import Unfinished, for_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cppo_lightning.rollout.ahead import TrainingRollouts
    from cppo_lightning.rollout.stream import RolloutStream


class Progress:
    """Position in the problems, rollouts that have been sampled and not been trained on, and random generators.

    Args:
        rollouts: draws them.
        stream: cuts them into minibatches.
        sampling: this rank's number among those that sample problems of their own, and how many these are.
        training: its number among those that train on rollouts of their own, and how many these are.
        drawn_with: what rollouts depend on besides weights.
    """

    def __init__(
        self,
        rollouts: TrainingRollouts,
        stream: RolloutStream,
        sampling: tuple[int, int],
        training: tuple[int, int],
        drawn_with: Mapping[str, float | str],
    ) -> None:
        self.rollouts = rollouts
        self.stream = stream
        self.sampling = sampling
        self.training = training
        self.drawn_with = drawn_with

    def state_dict(self, trained: int | None, seconds: float) -> dict[str, Any]:
        """Tensors and plain values; ``ranks``, and which of them are ``leading`` and keep their hands, are None but on rank 0.

        Every rank must call it.

        Args:
            trained: updates that have been taken on the stream's rollout; None if it has none left.
            seconds: how long to wait for a rollout that is being drawn ahead; a signal that is deferred ends the wait.
        """
        hand = self.stream.hand
        mine = Unfinished(
            hand=None if hand is None or trained is None else replace(hand, trained=trained),
            ahead=self.rollouts.ready(seconds),
            generators=generator_states(),
        )
        found = on_rank_zero((self.training[0], mine.state_dict()))
        common = {"prompt_position": self.rollouts.position, "drawn_with": dict(self.drawn_with)}
        if found is None:
            return {**common, "ranks": None, "leading": None}
        numbers = [number for number, _ in found]
        leading = [numbers.index(number) for number in sorted(set(numbers))]
        # ranks that train on the same rollout have the same in hand
        ranks = [part if rank in leading else {**part, "hand": None} for rank, (_, part) in enumerate(found)]
        return {**common, "ranks": ranks, "leading": leading}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave on rank 0, on any number of ranks.

        A rollout ahead that was drawn with other settings, or of other problems, is drawn again.

        Raises:
            ConfigError: it is in the middle of a rollout with another number of updates, temperature or anchor, without the
                top-K that the trust region reads, or drawn ahead, for a run that draws none ahead.
        """
        parts = [Unfinished.from_state(part) for part in state["ranks"]]
        sampled = for_rank(parts, *self.sampling)
        trained = for_rank([parts[rank] for rank in state["leading"]], *self.training)
        before, now = state["drawn_with"], self.drawn_with
        if trained.hand is not None and before["temperature"] != now["temperature"]:
            raise ConfigError(
                f"the checkpoint holds the rest of a rollout that was sampled at temperature {before['temperature']}, and "
                f"data.sampling.temperature is {now['temperature']}: go on with {before['temperature']}, or from a checkpoint "
                "between two rollouts"
            )
        if trained.hand is not None and before.get("max_staleness", 0) and not now["max_staleness"]:  # older files lack it
            raise ConfigError(
                "the checkpoint holds the rest of a rollout of a run with data.plan.max_staleness 1, whose samples may be too "
                "old for 0: go on with 1, or from a checkpoint between two rollouts"
            )
        self.rollouts.restore(state["prompt_position"], sampled.ahead if before == now else None)
        self.stream.restore(trained.hand, sampled.generators)
