"""avg@k on held-out problems, sampled by the training run's own engine and judged by its own verifier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import notify, rollout_data
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import WeightedMeans, drain, log_metrics
from cppo_lightning.prompts import PromptSource
from cppo_lightning.ranks import on_all_ranks
from cppo_lightning.verifiers.base import Outcome, Problem

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.rollout.sampler import Sample


class EvalAccuracy(Callback):
    """Accuracy over k samples per problem, before training, every few rollouts and at the end.

    Logs for each set ``eval/<set>/avg@<k>``, ``eval/<set>/truncated_share`` and ``eval/<set>/unparseable_share``, and
    ``eval/avg@<k>``, the unweighted mean over sets.  Ranks divide the problems and each problem counts once.

    Args:
        datasets: problems by the set's name.
        every_n_rollouts: rollouts between two evaluations.
        samples: k, responses to each problem.
        temperature: sampling temperature.
        top_p: nucleus mass kept.
        max_tokens: longest response; None takes the training rollouts' limit.
        at_start: evaluate before the first rollout.
        at_end: evaluate after the last one, whatever ``every_n_rollouts``.
        batch_problems: problems per call of the engine and rank; None samples as many responses at once as a rollout has.

    Raises:
        ConfigError: a value outside its range, or (when training is set up) a set that is empty or cannot be read.
    """

    def __init__(
        self,
        datasets: dict[str, PromptSource],
        every_n_rollouts: int = 10,
        samples: int = 16,
        temperature: float = 0.7,
        top_p: float = 0.95,
        max_tokens: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        batch_problems: int | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        if not datasets or any(not name or "/" in name for name in datasets):
            raise ConfigError(f"{self.name}.datasets must name at least one set, without '/', got {list(datasets)}")
        for key, value in (("every_n_rollouts", every_n_rollouts), ("samples", samples), ("batch_problems", batch_problems)):
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}.{key} must be at least 1, got {value}")
        if temperature == 0 and samples > 1:
            raise ConfigError(f"{self.name}.samples must be 1 at temperature 0 (all would be equal), got {samples}")
        try:
            Sampling(1 if max_tokens is None else max_tokens, temperature, top_p)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error
        self.datasets = datasets
        self.every_n_rollouts = every_n_rollouts
        self.samples = samples
        self.temperature = temperature
        self.top_p = top_p
        self.max_tokens = max_tokens
        self.at_start = at_start
        self.at_end = at_end
        self.batch_problems = batch_problems
        self.history: list[tuple[int, dict[str, float]]] = []  # (optimizer steps, metrics), first to last
        self._problems: dict[str, Sequence[Problem]] = {}
        self._means = {name: WeightedMeans([self._tag(name), *self._shares(name)]) for name in datasets}

    @property
    def mean_tag(self) -> str:
        """Tag of the unweighted mean over sets."""
        return f"eval/avg@{self.samples}"

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted(self.datasets), samples=self.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [(int(step), dict(metrics)) for step, metrics in state_dict["history"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: reads the problems."""
        if stage != "fit":
            return
        data = rollout_data(trainer, self.name)
        others = [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, EvalAccuracy) and c is not self]
        if any(other.mean_tag == self.mean_tag for other in others):
            raise ConfigError(f"two callbacks would log {self.mean_tag}; put their sets into one, or give them other samples")
        self._problems = {name: data.load(source, name, self.max_tokens) for name, source in self.datasets.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout: evaluates the initial policy, unless a checkpoint brought its accuracy along."""
        if self.at_start and not self.history:
            self.evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update, before checkpoints that monitor a metric are written."""
        rollouts = trainer.current_epoch + 1
        if rollouts % self.every_n_rollouts == 0 or (self.at_end and rollouts == trainer.max_epochs):
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training: evaluates a run that ended early, by steps, time or a stop from elsewhere."""
        if self.at_end and (not self.history or self.history[-1][0] != trainer.global_step):
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Sample, judge and log every set with the policy's current weights; every rank must call it."""
        data = rollout_data(trainer, self.name)
        data.sync_weights()
        sampling = Sampling(self.max_tokens or data.sampling.max_tokens, self.temperature, self.top_p)
        at_once = data.plan.prompts * data.plan.samples // (self.samples * trainer.world_size)
        size = self.batch_problems or max(1, at_once)
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, problems in self._problems.items():
            mine = problems[trainer.global_rank :: trainer.world_size]
            on_all_ranks(partial(self._sample, trainer, name, mine, size, sampling))
            metrics |= drain(self._means[name], pl_module.device)
        metrics[self.mean_tag] = sum(metrics[self._tag(name)] for name in self._problems) / len(self._problems)
        metrics["eval/seconds"] = time.perf_counter() - started
        log_metrics(trainer, metrics)
        self.history.append((trainer.global_step, metrics))
        notify(trainer, "on_evaluation_end", metrics)
        return metrics

    def _sample(self, trainer: Trainer, name: str, problems: Sequence[Problem], size: int, sampling: Sampling) -> None:
        """Add up what this rank's ``problems`` of a set give, ``size`` at a time."""
        data = rollout_data(trainer, self.name)
        for first in range(0, len(problems), size):
            notify(trainer, "on_evaluation_progress", name, first, len(problems))
            seed = data.draw_seed("eval", name, trainer.global_step, first)
            samples = data.sampler.sample(problems[first : first + size], self.samples, sampling, seed=seed).samples
            self._means[name].update(self._totals(name, samples))

    def _totals(self, name: str, samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
        outcomes = [sample.verdict.outcome for sample in samples]
        truncated, unparseable = self._shares(name)
        return {
            self._tag(name): (outcomes.count(Outcome.CORRECT), len(samples)),
            truncated: (sum(not sample.completion.finished for sample in samples), len(samples)),
            unparseable: (outcomes.count(Outcome.UNPARSEABLE), len(samples)),
        }

    def _tag(self, name: str) -> str:
        return f"eval/{name}/avg@{self.samples}"

    def _shares(self, name: str) -> tuple[str, str]:
        return f"eval/{name}/truncated_share", f"eval/{name}/unparseable_share"
