"""avg@k, pass@k and maj@k on held-out problems, sampled by the training run's own engine and judged by its own verifier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import RolloutData, answers_folder, notify, rollout_data, tensorboards
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import log_metrics
from cppo_lightning.prompts import PromptSource
from cppo_lightning.ranks import on_all_ranks, sampling_share
from cppo_lightning.resume import updates_taken
from cppo_lightning.rollout.answers import conclude
from cppo_lightning.rollout.evaluation import Evaluation, EvaluationStream, check_counts, check_sets, check_temperature
from cppo_lightning.verifiers.base import Problem

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.rollout.scores import Row


class EvalAccuracy(Callback):
    """Accuracy over n samples per problem, before training, every few rollouts and at the end.

    Logs for each set ``eval/<set>/avg@<n>``, ``eval/<set>/pass@<k>`` for powers of two up to n and n itself,
    ``eval/<set>/maj@<n>`` (:mod:`cppo_lightning.estimators` says what these are), ``eval/<set>/truncated_share`` and
    ``eval/<set>/unparseable_share``, and the unweighted means over sets ``eval/avg@<n>``, ``eval/pass@<n>`` and
    ``eval/maj@<n>``.  All but the shares have the ends of their 95 % bootstrap intervals over problems beside them, as
    ``<tag>_low`` and ``<tag>_high``; with one sample there is avg@1 alone.  ``eval/curves`` in TensorBoard draws all
    evaluations so far.

    Every answer is kept in ``evaluations/<set>/step=N.parquet`` in the logger's folder, with the columns that
    :mod:`cppo_lightning.rollout.answers` lists.  Ranks divide the problems and each problem counts once.

    Args:
        datasets: problems by the set's name.
        every_n_rollouts: rollouts between two evaluations.
        samples: n, responses to each problem.
        temperature: sampling temperature.
        top_p: nucleus mass kept.
        max_tokens: longest response; None takes the training rollouts' limit.
        at_start: evaluate before the first rollout.
        at_end: evaluate after the last one, whatever ``every_n_rollouts``.
        batch_problems: problems per call of the engine and rank; None samples as many responses at once as a rollout has.

    Raises:
        ConfigError: a value outside its range, or (when training is set up) a set that is empty, cannot be read, or is
            evaluated by another callback too.
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
        check_sets(self.name, datasets)
        counts = {"every_n_rollouts": every_n_rollouts, "samples": samples, "batch_problems": batch_problems}
        check_counts(self.name, counts)
        check_temperature(self.name, temperature, samples)
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

    @property
    def mean_tag(self) -> str:
        """Tag of the unweighted mean of avg@n over sets."""
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
        if twice := sorted({name for other in others for name in other.datasets if name in self.datasets}):
            raise ConfigError(f"two callbacks would log eval/{twice[0]}/...; give the set to one, or another name")
        self._problems = {name: data.load(source, name, self.max_tokens) for name, source in self.datasets.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout: evaluates the initial policy, unless a checkpoint brought its accuracy along, or
        a checkpoint's policy, if that was due and was cut off.
        """
        if (self.at_start and not self.history) or self._overdue(trainer):
            self.evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update, before checkpoints that monitor a metric are written."""
        # a rollout on which no step was taken leaves weights that have been evaluated
        if self._due(trainer, trainer.current_epoch + 1) and not self._evaluated(trainer):
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training: evaluates a run that ended early, by steps, time or a stop from elsewhere."""
        if self._overdue(trainer) or (self.at_end and not self._evaluated(trainer)):
            self.evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs last, also where a checkpoint leaves nothing to train and Lightning passes over the hooks above."""
        self.on_train_end(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Sample, judge, keep and log every set with the policy's current weights; every rank must call it."""
        data, share, step = rollout_data(trainer, self.name), sampling_share(trainer), trainer.global_step
        started = time.perf_counter()
        data.sync_weights()  # here and not in the loop below, where a rank that failed would wait for those in a collective
        tell = partial(notify, trainer, "on_evaluation_progress")
        stream = EvaluationStream(self._problems, self._evaluation(data, share[1]), share, step, data, tell)
        rows: list[Row] = on_all_ranks(lambda: [row for batch in stream for row in batch.rows()])
        scores = conclude(rows, self.samples, step, answers_folder(trainer))
        metrics = {**scores.metrics(), "eval/seconds": time.perf_counter() - started}
        log_metrics(trainer, metrics)
        self.history.append((step, metrics))
        self._draw(trainer)
        notify(trainer, "on_evaluation_end", metrics)
        return metrics

    def _due(self, trainer: Trainer, rollouts: int) -> bool:
        """Whether the weights after so many rollouts are to be evaluated."""
        return rollouts % self.every_n_rollouts == 0 or (self.at_end and rollouts == trainer.max_epochs)

    def _overdue(self, trainer: Trainer) -> bool:
        """Whether the run stands between two rollouts and lacks the evaluation due there, which an interrupt has cut off."""
        rollouts, within = trainer.current_epoch, updates_taken(trainer.fit_loop.epoch_loop.batch_progress)
        return rollouts > 0 and not within and self._due(trainer, rollouts) and not self._evaluated(trainer)

    def _evaluated(self, trainer: Trainer) -> bool:
        return bool(self.history) and self.history[-1][0] == trainer.global_step

    def _evaluation(self, data: RolloutData, ranks: int) -> Evaluation:
        at_once = data.plan.prompts * data.plan.samples // (self.samples * ranks)
        return Evaluation(
            samples=self.samples,
            sampling=Sampling(self.max_tokens or data.sampling.max_tokens, self.temperature, self.top_p),
            batch_prompts=self.batch_problems or max(1, at_once),
            datasets=self.datasets,
        )

    def _draw(self, trainer: Trainer) -> None:
        """The curves of all sets that this run evaluates, in one picture."""
        writers = tensorboards(trainer)
        if not trainer.is_global_zero or not writers:
            return
        from cppo_lightning.figures.validation import Curve, validation_curves

        curves = []
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, EvalAccuracy) and callback.history:
                steps, metrics = zip(*callback.history, strict=True)
                for name, tag in callback.curve_tags().items():
                    value, low, high = ([found[end] for found in metrics] for end in (tag, f"{tag}_low", f"{tag}_high"))
                    curves.append(Curve(name, steps, value, low, high))
        for writer in writers:
            writer.add_figure("eval/curves", validation_curves(curves), trainer.global_step)

    def curve_tags(self) -> dict[str, str]:
        """Tag by name of what ``eval/curves`` shows: every set, and their mean where there are several."""
        tags = {f"{name} avg@{self.samples}": f"eval/{name}/avg@{self.samples}" for name in self.datasets}
        return tags | ({f"mean avg@{self.samples}": self.mean_tag} if len(tags) > 1 else {})
