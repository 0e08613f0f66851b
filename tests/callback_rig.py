"""A small real run for callbacks: the Trainer is Lightning's, the gates and rollouts are written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.rollout.sampler import Rollout, Sample
from cppo_lightning.rollout.stream import RolloutPlan
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict

UPDATES = 2


def stats_and_gate() -> tuple[TokenStats, Gate]:
    """Three responses with 5, 2 and 0 trainable tokens; 3 of 7 tokens are dropped.  Masked entries hold garbage."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    keep = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    by_budget = torch.tensor([[0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    divergence = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 9.0, 0.7, 9.0, 9.0], [9.0] * 5])
    zeros = torch.zeros(3, 5)
    stats = TokenStats(torch.zeros(3, 5, dtype=torch.long), zeros + 0.1, zeros, torch.ones(3, 1).expand(3, 5), mask)
    diagnostics = {
        "toward": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool(),
        "masked_by_position": torch.tensor([[0, 0, 1, 0, 0]] + [[0] * 5] * 2).bool(),
        "masked_by_budget": by_budget,
        "divergence": divergence,
        "weighted_divergence": divergence / 2,
        "threshold": torch.where(mask, 0.07, 99.0),
        "budget_exhausted": torch.tensor([True, False, True]),
        "budget_spent": torch.tensor([1.2, 0.5, 99.0]),
        "delta_b": torch.tensor([0.02, 0.04, 99.0]),
        "first_exhausted": torch.tensor([3, -1, 0]),
    }
    return stats, Gate(keep.float(), keep, diagnostics)


def rows(stats: TokenStats, gate: Gate, chosen: Sequence[int]) -> tuple[TokenStats, Gate]:
    """Some of the responses, as a micro-batch or a rank would have them."""
    i = torch.tensor(chosen)
    cut = TokenStats(stats.response_ids[i], stats.logp[i], stats.rollout_logp[i], stats.advantages[i], stats.mask[i])
    return cut, Gate(gate.weight[i], gate.keep[i], {name: value[i] for name, value in gate.diagnostics.items()})


def rollout(outcomes: Sequence[Sequence[Outcome]], text: str = "4", version: int = 0) -> Rollout:
    """Group g has the given outcomes; response j of it has j + 1 tokens; the last of each group was cut off."""
    samples = []
    for g, group in enumerate(outcomes):
        problem = Problem(f"p{g}", ({"role": "user", "content": f"2 + {g}?"},), str(2 + g))
        for j, outcome in enumerate(group):
            completion = Completion(torch.zeros(j + 1, dtype=torch.long), torch.zeros(j + 1), finished=j + 1 < len(group))
            samples.append(Sample(problem, [1], completion, text, Verdict(outcome, float(outcome is Outcome.CORRECT), text)))
    return Rollout(samples, len(outcomes[0]), version, seconds_sampling=2.0, seconds_verifying=0.5)


class Sums:
    """Answers problem i correctly i times."""

    def sample(self, problems: Sequence[Problem], n: int, sampling: Sampling, seed: int) -> Rollout:
        self.asked = [*getattr(self, "asked", []), (len(problems), sampling)]
        return rollout([[Outcome.CORRECT] * int(p.id) + [Outcome.UNPARSEABLE] * (n - int(p.id)) for p in problems])


class Data(LightningDataModule):
    """Hands out one hand-made rollout per epoch."""

    plan, sampling = RolloutPlan(prompts=2, samples=4, updates=UPDATES), Sampling(max_tokens=7)

    def __init__(self, outcomes: Sequence[Sequence[Outcome]]) -> None:
        super().__init__()
        self.sampler, self.rollout, self.synced = Sums(), rollout(outcomes), 0

    def sync_weights(self) -> None:
        self.synced += 1

    def draw_seed(self, *purpose: str | int) -> int:
        return len(purpose)

    def load(self, source: Any, name: str, max_tokens: int | None = None) -> list[Problem]:
        return source.load()

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(list(range(UPDATES)), batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Module(LightningModule):
    """Shows its callbacks the hand-made gate, one response at a time, and takes an optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.automatic_optimization = torch.nn.Parameter(torch.zeros(1)), False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: int, batch_idx: int) -> None:
        for i in range(self.global_rank, 3, self.trainer.world_size):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "on_gate"):
                    callback.on_gate(self.trainer, self, *rows(*stats_and_gate(), [i]))
        self.manual_backward(self.weight.sum())
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: int, batch_idx: int) -> None: ...
    def test_step(self, batch: int, batch_idx: int) -> None: ...
    def predict_step(self, batch: int, batch_idx: int) -> int:
        return batch


def trainer(folder: Path, callbacks: list[Any], rollouts: int = 2, **settings: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": rollouts,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(hasattr(callback, "is_enabled") for callback in callbacks),
        "logger": TensorBoardLogger(folder, name="", version="run"),
    }
    return Trainer(callbacks=callbacks, **{**defaults, **settings})


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "run")).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: ``(step, value)`` by tag."""
    found = events(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
