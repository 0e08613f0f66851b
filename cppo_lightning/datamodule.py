"""The LightningDataModule: prompts, engine and verifier become a stream of rollouts."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from cppo_lightning.advantages import AdvantageEstimator, GroupRelative
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.errors import ConfigError
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
from cppo_lightning.rollout.settings import check_settings, check_training
from cppo_lightning.verifiers import Verifier, VerifierPool
from cppo_lightning.verifiers.overlong import Overlong

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor

    from cppo_lightning.mismatch import Anchor
    from cppo_lightning.verifiers import Problem


class Trained(Protocol):
    """What the datamodule needs of the module: the policy's weights by Hugging Face name, and whether it wants pi_old."""

    @property
    def anchor(self) -> Anchor: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...

    def recompute(self, batch: RolloutBatch) -> RolloutBatch: ...


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
        self.model = model
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
        self.rollouts: TrainingRollouts | None = None  # of fit
        self.rollout: Rollout | None = None  # what is trained on, or was at last
        self._restored: dict[str, Any] | None = None  # of a checkpoint
        self._weights_current = False

    def setup(self, stage: str) -> None:
        """Load tokenizer and problems and have every gold answer checked; the engine starts with the first weights."""
        from transformers import AutoConfig, AutoTokenizer

        self._weights_current = False  # another stage may come with other weights
        world = self._trainer().world_size
        if stage == "fit":
            check_training(self.plan, world, self._trained().anchor)
        if stage != "fit" and self.evaluation is None:
            raise ConfigError(f"data.evaluation is not set; {stage} needs to know what to sample")
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
            ranks = (self._trainer().global_rank, world)
            self.rollouts = TrainingRollouts(
                order, refills, self.plan, ranks, sync=self.sync_weights, sample=self._sample, seed=self.draw_seed
            )
            self.fingerprint = training.fingerprint
            self._restore()
        if self.evaluation is not None:
            self.evaluated = self.load(self.evaluation.prompts, "evaluation", self.evaluation.sampling.max_tokens)

    def load(self, source: PromptSource, name: str, max_tokens: int | None = None) -> Sequence[Problem]:
        """Problems to evaluate on, as the set ``name``, with up to ``max_tokens`` tokens in a response (None: as in training).

        Raises:
            ConfigError: a problem that cannot be used, or one that is trained on while ``on_contamination`` is "raise".
        """
        return self.sets.load_evaluation(name, source, max_tokens or self.sampling.max_tokens).problems

    def sync_weights(self) -> None:
        """Hand the policy's current weights to the engine, once it is free, unless it has them already."""
        if self.rollouts is not None:
            self.rollouts.wait()
        trainer = self._trainer()
        version = trainer.global_step
        if self._weights_current and self.engine.version == version:
            return
        self.engine.start(self.model)
        self.engine.load_weights(self._trained().named_weights(), version)
        self._weights_current = True

    def draw_seed(self, *purpose: str | int) -> int:
        """The engine's seed for one purpose, from the run's seed and this rank: it depends on nothing that ran before."""
        text = "/".join(map(str, (self.seed, self._trainer().global_rank, *purpose)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1  # an int64

    def train_dataloader(self) -> DataLoader[RolloutBatch]:
        # the id in padding is never read: attention and losses are masked
        trained = self._trained()
        recompute = trained.recompute if trained.anchor == "recomputed" else None
        stream = RolloutStream(self._draw, self.advantages, self.plan.updates, self.top_k, 0, self.overlong, recompute)
        return DataLoader(stream, batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader[Rollout] | list[Any]:
        """Nothing during fit: what is evaluated there, and when, is up to callbacks."""
        return [] if self._trainer().state.fn == "fit" else self._evaluation_loader()

    def test_dataloader(self) -> DataLoader[Rollout]:
        return self._evaluation_loader()

    def predict_dataloader(self) -> DataLoader[Rollout]:
        return self._evaluation_loader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, RolloutBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        return {"prompt_position": self._training().position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if hasattr(self, "sets") and self.sets.training is not None:  # else setup does it, or nothing is trained
            self._restore()

    def _restore(self) -> None:
        """Go on where a checkpoint ended, if the problems are those it was trained on."""
        if self._restored is None:
            return
        theirs = self._restored["fingerprint"]
        if theirs != self.fingerprint and not self.allow_other_data:
            raise ConfigError(
                f"the checkpoint was trained on problems with the fingerprint {theirs}, these have {self.fingerprint}: restore "
                "data.prompts, data.template and what drops problems, or set data.allow_other_data: true to go on with these"
            )
        self._training().position = self._restored["prompt_position"]

    def teardown(self, stage: str) -> None:
        self._stop()

    def on_exception(self, exception: BaseException) -> None:
        self._stop()

    def close(self) -> None:
        """Free the engine's model and end the verifier's processes.  Safe to call twice."""
        self._stop()
        self.engine.close()
        self.pool.close()

    def _stop(self) -> None:
        """A rollout that is drawn ahead must not outlive the run, nor use what is closed."""
        if self.rollouts is not None:
            self.rollouts.stop()

    def _draw(self) -> Rollout:
        trainer = self._trainer()
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        last = 0 <= epochs <= trainer.current_epoch + 1 or 0 <= steps <= trainer.global_step + self.plan.updates
        self.rollout = self._training().next(another=not last)
        return self.rollout

    def _sample(self, problems: list[Problem], seed: int) -> Rollout:
        return self.sampler.sample(problems, self.plan.samples, self.sampling, self.top_k, seed)

    def _evaluation_loader(self) -> DataLoader[Rollout]:
        evaluation = self.evaluation
        assert evaluation is not None, "setup refused this"

        def sample(problems: Sequence[Problem], place: int) -> Rollout:
            self.sync_weights()
            seed = self.draw_seed("evaluation", place)
            return self.sampler.sample(problems, evaluation.samples, evaluation.sampling, seed=seed)

        mine = self.evaluated[self._trainer().global_rank :: self._trainer().world_size]
        return DataLoader(EvaluationStream(mine, evaluation.batch_prompts, sample), batch_size=None, num_workers=0)

    def _training(self) -> TrainingRollouts:
        assert self.rollouts is not None, "setup makes them"
        return self.rollouts

    def _trained(self) -> Trained:
        return cast("Trained", self._trainer().lightning_module)

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("RolloutDataModule works inside a Trainer; pass it as datamodule=")
        return self.trainer
