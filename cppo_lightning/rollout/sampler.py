"""From problems to judged samples: template, engine and verifier pool in one place, for training and evaluation alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cppo_lightning.engines.engine import Completion, RolloutEngine, Sampling
from cppo_lightning.errors import RolloutError
from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.verifiers.base import Problem, Verdict

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cppo_lightning.prompts import PromptTemplate
    from cppo_lightning.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class Sample:
    """One response to one problem, judged."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    text: str  # the response, decoded without special tokens
    verdict: Verdict
    old_logp: Tensor | None = None  # [t] float32, log pi_old by the trainer, where its ratios start there

    def row(self) -> dict[str, Any]:
        """What there is to read of it, ready for JSON."""
        return {
            "id": self.problem.id,
            "prompt": [dict(message) for message in self.problem.messages],
            "response": self.text,
            "answer": self.problem.answer,
            "extracted": self.verdict.extracted,
            "outcome": str(self.verdict.outcome),
            "reward": self.verdict.reward,
            "tokens": len(self.completion.ids),
            "finished": self.completion.finished,
        }


@dataclass(frozen=True)
class Rollout:
    """What one call of the sampler gave: ``n`` samples per problem, prompt-major."""

    samples: list[Sample]
    n: int
    version: int  # optimizer steps that the sampling weights had seen
    seconds_sampling: float  # until the last response had ended
    seconds_verifying: float  # from then until the last verdict

    @property
    def num_tokens(self) -> int:
        return sum(len(s.completion.ids) for s in self.samples)

    def groups(self) -> list[list[Sample]]:
        """The samples of each problem."""
        return [self.samples[i : i + self.n] for i in range(0, len(self.samples), self.n)]


class Sampler:
    """Draws and judges responses with the engine's current weights."""

    def __init__(
        self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, pool: VerifierPool
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.pool = pool

    def sample(self, problems: Sequence[Problem], n: int, sampling: Sampling, top_logprobs: int = 0, seed: int = 0) -> Rollout:
        """Draw ``n`` responses to each problem, each judged while others are still being drawn; ``seed`` fixes the draws.

        Raises:
            RolloutError: the engine returned fewer or other responses than it handed out, a token without a finite
                log-probability, or one not in float32; or no verifier process stays alive.  No further verdict is waited for.
        """
        prompts = [self.template.encode(self.tokenizer, problem) for problem in problems]
        handed_out: dict[int, Completion] = {}
        texts: dict[int, str] = {}
        verdicts: dict[int, Future[Verdict]] = {}

        def judge(place: int, completion: Completion) -> None:
            problem = problems[place // n]
            completion.check(problem.id)
            handed_out[place] = completion
            texts[place] = str(self.tokenizer.decode(completion.ids.tolist(), skip_special_tokens=True))
            verdicts[place] = self.pool.submit(problem, texts[place])

        started = time.perf_counter()
        try:
            with INTERRUPTS.at_once():
                completions = self.engine.generate(prompts, n, sampling, top_logprobs, seed, on_completion=judge)
                sampled = time.perf_counter()
                self._check(completions, handed_out, [problem.id for problem in problems for _ in range(n)])
                samples = [
                    Sample(problems[place // n], prompts[place // n], completion, texts[place], verdicts[place].result())
                    for place, completion in enumerate(completions)
                ]
        except BaseException:
            for verdict in verdicts.values():
                verdict.cancel()  # else the next rollout waits behind what nobody reads
            raise
        return Rollout(samples, n, self.engine.version, sampled - started, time.perf_counter() - sampled)

    def _check(self, completions: Sequence[Completion], handed_out: Mapping[int, Completion], ids: Sequence[str]) -> None:
        """Compare what is trained on with what was judged; the engine had it in hand in between, so it is checked again."""
        name = type(self.engine).__name__
        if not len(handed_out) == len(completions) == len(ids):
            raise RolloutError(
                f"{name} returned {len(completions)} of {len(ids)} responses and handed {len(handed_out)} to on_completion"
            )
        for place, (completion, prompt_id) in enumerate(zip(completions, ids, strict=True)):
            if completion is not handed_out[place]:
                raise RolloutError(f"prompt {prompt_id!r}: {name} returned another response than it handed to on_completion")
            completion.check(prompt_id)
            if completion.logp.dtype != torch.float32:
                raise RolloutError(f"prompt {prompt_id!r}: {name} returned log-probabilities in {completion.logp.dtype}")
