"""What a callback may be shown: gates as they are made, minibatches on which no step was taken, and what is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats

T = TypeVar("T")


@runtime_checkable
class GateObserver(Protocol):
    """A callback that wants to see every gate."""

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs once per micro-batch, after the trust region decided and before the backward pass."""
        ...


@runtime_checkable
class NonFiniteObserver(Protocol):
    """A callback that wants to see the minibatches on which no step could be taken."""

    def on_nonfinite_step(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, terms: Tensor) -> None:
        """Runs on every rank in place of an optimizer step whose loss or gradient is not finite, while the gradients are there.

        Args:
            batch: this rank's part of the minibatch.
            terms: its shares ``[2]`` of surrogate and reference KL.
        """
        ...


@runtime_checkable
class MetricsObserver(Protocol):
    """A callback that wants to see every number that is logged by ``metrics.log_metrics``."""

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Runs after metrics that belong together were logged, reduced over ranks, at ``step``; at least on rank 0."""
        ...


def observers(trainer: Trainer, kind: type[T]) -> list[T]:
    """The trainer's callbacks that are of this kind."""
    return [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]
