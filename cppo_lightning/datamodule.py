"""The LightningDataModule: prompts, engine and verifier become a stream of rollouts."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from cppo_lightning.advantages import AdvantageEstimator, GroupRelative
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
from cppo_lightning.ranks import data_share, gone_through, on_all_ranks, sampling_share, with_same_batch
from cppo_lightning.resume import tell_other_versions, updates_taken, versions
from cppo_lightning.rollout import (
    PromptOrder,
    PromptSource,
    PromptTemplate,
    Rollout,
    RolloutEngine,
    RolloutPlan,
    RolloutStream,
    Sampler,
    Sampling,
)
from cppo_lightning.rollout.ahead import TrainingRollouts
from cppo_lightning.rollout.evaluation import Evaluation, EvaluationStream
from cppo_lightning.rollout.problem_sets import DataRules, ProblemSets, context_length
from cppo_lightning.rollout.progress import Progress
from cppo_lightning.rollout.saved import joined
from cppo_lightning.rollout.settings import check_same_data, check_settings, check_training, drawn_with
from cppo_lightning.verifiers import Verifier, VerifierPool
from cppo_lightning.verifiers.overlong import Overlong

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor

    from cppo_lightning.mismatch import Anchor, RecomputedBatch
    from cppo_lightning.verifiers import Problem


_PATIENCE = 10.0  # seconds that a run which is ending waits for a rollout that is being drawn ahead


class Trained(Protocol):
    """What the datamodule needs of the module: the policy's weights by Hugging Face name, how many optimizer steps they have
    seen, and whether it wants pi_old."""

    @property
    def anchor(self) -> Anchor: ...

    @property
    def version(self) -> int: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...

    def recompute(self, batch: RolloutBatch) -> RecomputedBatch: ...


class RolloutDataModule(LightningDataModule):
    """Streams rollouts: each epoch, fresh weights go to the engine, it samples, the verifier judges, and minibatches come out.

    Args:
        model: the policy's folder or hub id, for its tokenizer and the engine (linked to ``model.policy.path``).
        prompts: training problems.
        verifier: judges responses, always in child processes; a bare verifier gets a :class:`VerifierPool` with its usual
            deadline and memory limit.
        engine: samples responses.
        plan: prompts, samples and updates per rollout.
        sampling: how training responses are drawn; must not be truncated.
        template: how a problem becomes a prompt.
        advantages: turns a group's rewards into advantages.
        overlong: penalty on long responses, added to the rewards before advantages are computed; null for none.
        evaluation: what ``validate``, ``test`` and ``predict`` use; None when they are not needed.
        on_bad_row: "raise" stops before training at the first row that cannot be used, of any set; "skip" counts them.
        max_prompt_tokens: longer training prompts are dropped and counted; None for what the context leaves to prompts.
        on_contamination: "report" or "raise" when problems of an evaluation set are among the training problems.
        allow_other_data: resume from a checkpoint of other training problems, counting on from its position in them.
        top_k: how many of mu's most likely tokens rollouts carry (linked to what the trust region reads).
        seed: fixes the order of prompts and the engine's random numbers.

    Raises:
        ConfigError: truncated or greedy sampling, a penalty for lengths that cannot be reached, a ``top_k`` that the engine
            cannot return, or rollouts ahead with an engine that cannot sample while the policy is trained.
    """

    def __init__(
        self,
        model: str,
        prompts: PromptSource,
        verifier: Verifier | VerifierPool,
        engine: RolloutEngine,
        plan: RolloutPlan = RolloutPlan(),
        sampling: Sampling = Sampling(),
        template: PromptTemplate = PromptTemplate(),
        advantages: AdvantageEstimator = GroupRelative(),
        overlong: Overlong | None = None,
        evaluation: Evaluation | None = None,
        on_bad_row: Literal["raise", "skip"] = "raise",
        max_prompt_tokens: int | None = None,
        on_contamination: Literal["report", "raise"] = "report",
        allow_other_data: bool = False,
        top_k: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(plan, sampling, overlong, engine, top_k)
        self.model = os.path.expanduser(model)
        self.prompts = prompts
        self.pool = verifier if isinstance(verifier, VerifierPool) else VerifierPool(verifier)
        self.engine = engine
        self.plan = plan
        self.sampling = sampling
        self.template = template
        self.advantages = advantages
        self.overlong = overlong
        self.evaluation = evaluation
        self.rules = DataRules(on_bad_row, on_contamination, max_prompt_tokens)
        self.allow_other_data = allow_other_data
        self.top_k = top_k
        self.seed = seed
        self.progress: Progress | None = None  # of fit
        self.rollout: Rollout | None = None  # what is trained on, or was at last
        self._restored: dict[str, Any] | None = None  # of a checkpoint
        self._weights_current = False

    def setup(self, stage: str) -> None:
        """Load tokenizer and problems and have every gold answer checked; the engine starts with the first weights."""
        from transformers import AutoConfig, AutoTokenizer

        self._weights_current = False  # another stage may come with other weights
        share = sampling_share(self._trainer())
        if stage == "fit":
            check_training(self.plan, share[1], self._trained().anchor)
        if stage != "fit" and self.evaluation is None:
            raise ConfigError(f"data.evaluation is not set; {TrainerFn(stage).value} needs to know what to sample")
        config = AutoConfig.from_pretrained(self.model, trust_remote_code=False).get_text_config()
        if self.top_k > config.vocab_size:
            raise ConfigError(
                f"the trust region reads the top {self.top_k} tokens of a vocabulary of {config.vocab_size}; lower its k"
            )
        # the tokenizer's own limit would only warn of prompts that are dropped below
        tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False, model_max_length=sys.maxsize)
        self.sampler = Sampler(self.engine, tokenizer, self.template, self.pool)
        self.sets = ProblemSets(self.sampler, self.rules, context_length(config, self.engine), self._trainer().is_global_zero)
        if stage == "fit":
            training, shares = self.sets.load_training(self.prompts, self.sampling.max_tokens), self.prompts.shares()
            order = PromptOrder(training.problems, self.seed, shares)
            refills = PromptOrder(training.problems, self.seed + 2**31, shares)  # another shuffle of the same problems
            rollouts = TrainingRollouts(
                order, refills, self.plan, share, sync=self._hand_over, sample=self._sample, seed=self.draw_seed
            )
            self.fingerprint = training.fingerprint
            settings = drawn_with(self.plan, self.sampling, self.top_k, self.seed, self.fingerprint)
            self.progress = Progress(rollouts, self._stream(), share, data_share(self._trainer()), settings)
            self._restore()
        if self.evaluation is not None:
            longest = self.evaluation.sampling.max_tokens
            self.evaluated = {name: self.load(source, name, longest) for name, source in self.evaluation.sets.items()}

    def load(self, source: PromptSource, name: str, max_tokens: int | None = None) -> Sequence[Problem]:
        """Problems to evaluate on, as the set ``name``, with up to ``max_tokens`` tokens in a response (None: as in training).

        Raises:
            ConfigError: a problem that cannot be used, or one that is trained on while ``on_contamination`` is "raise".
        """
        return self.sets.load_evaluation(name, source, max_tokens or self.sampling.max_tokens).problems

    def sync_weights(self) -> None:
        """Hand the policy's current weights to the engine, once it is free on all ranks, unless it has them already.

        Every rank must call it.
        """
        if self.progress is not None:
            on_all_ranks(self.progress.rollouts.wait)
        on_all_ranks(self._hand_over)

    def _hand_over(self) -> None:
        """``sync_weights`` where nothing is being drawn."""
        version = self._trained().version
        if self._weights_current and self.engine.version == version:
            return
        weights = self._trained().named_weights()
        with gone_through(weights):
            self.engine.start(self.model)
            self.engine.load_weights(weights, version)
        self._weights_current = True

    def draw_seed(self, *purpose: str | int) -> int:
        """The engine's seed for one purpose, from the run's seed and this rank: it depends on nothing that ran before."""
        rank, _ = sampling_share(self._trainer())
        text = "/".join(map(str, (self.seed, rank, *purpose)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1  # an int64

    def train_dataloader(self) -> RolloutStream:
        return self._running().stream

    def val_dataloader(self) -> EvaluationStream | list[Any]:
        """Nothing during fit: what is evaluated there, and when, is up to callbacks."""
        return [] if self._trainer().state.fn == "fit" else self._evaluation_stream()

    def test_dataloader(self) -> EvaluationStream:
        return self._evaluation_stream()

    def predict_dataloader(self) -> EvaluationStream:
        return self._evaluation_stream()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, RolloutBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, by Lightning's counters between two updates; on rank 0 with what every rank holds.

        A rollout that is being drawn ahead is waited for, unless the run is ending.  Every rank must call it.
        """
        trainer = self._trainer()
        trained = updates_taken(trainer.fit_loop.epoch_loop.batch_progress)
        progress = self._running().state_dict(trained, _PATIENCE if trainer.interrupted else math.inf)
        return {**progress, "fingerprint": self.fingerprint, "versions": versions()}

    def expect(self, checkpoint: Mapping[str, Any]) -> None:
        """Tell ``setup`` which checkpoint ``fit`` will load, so that it refuses other data before any model is loaded."""
        self._restored = checkpoint.get(type(self).__qualname__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if hasattr(self, "sets") and self.sets.training is not None:  # else setup does it, or nothing is trained
            self._restore()

    def _restore(self) -> None:
        """Go on where a checkpoint ended, if the problems are those it was trained on."""
        if self._restored is None:
            return
        check_same_data(self._restored["fingerprint"], self.fingerprint, self.allow_other_data)
        tell_other_versions(self._restored["versions"])
        progress = self._running()
        progress.load_state_dict(self._restored)
        self.rollout = progress.stream.hand and progress.stream.hand.rollout

    def teardown(self, stage: str) -> None:
        self._stop()
        self._restored = None

    def on_exception(self, exception: BaseException) -> None:
        self._stop()

    def close(self) -> None:
        """Free the engine's model and end the verifier's processes.  Safe to call twice."""
        self._stop()
        self.engine.close()
        self.pool.close()

    def _stop(self) -> None:
        """A rollout that is drawn ahead must not outlive the run, nor use what is closed."""
        if self.progress is not None:
            self.progress.rollouts.stop()

    def _draw(self) -> Rollout:
        trainer = self._trainer()
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        last = 0 <= epochs <= trainer.current_epoch + 1 or 0 <= steps <= trainer.global_step + self.plan.steps
        self.rollout = joined(with_same_batch(trainer, self._running().rollouts.next(another=not last)))
        return self.rollout

    def _sample(self, problems: list[Problem], seed: int) -> Rollout:
        return self.sampler.sample(problems, self.plan.samples, self.sampling, self.top_k, seed)

    def _stream(self) -> RolloutStream:
        # the id in padding is never read: attention and losses are masked
        trained = self._trained()
        recompute = trained.recompute if trained.anchor == "recomputed" else None
        plan = self.plan
        return RolloutStream(self._draw, self.advantages, plan.updates, self.top_k, 0, self.overlong, recompute, plan.passes)

    def _evaluation_stream(self) -> EvaluationStream:
        assert self.evaluation is not None, "setup refused this"
        share = sampling_share(self._trainer())
        return EvaluationStream(self.evaluated, self.evaluation, share, self._trained().version, self)

    def _running(self) -> Progress:
        assert self.progress is not None, "setup makes it"
        return self.progress

    def _trained(self) -> Trained:
        return cast("Trained", self._trainer().lightning_module)

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("RolloutDataModule works inside a Trainer; pass it as datamodule=")
        return self.trainer
