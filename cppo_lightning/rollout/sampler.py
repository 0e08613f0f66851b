"""From problems to judged samples: template, engine and verifier pool in one place, for training and evaluation alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cppo_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from cppo_lightning.verifiers.base import Problem, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cppo_lightning.rollout.prompts import PromptTemplate
    from cppo_lightning.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class Sample:
    """One response to one problem, judged."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    text: str  # the response, decoded without special tokens
    verdict: Verdict

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
    seconds_sampling: float
    seconds_verifying: float

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
        """Draw ``n`` responses to each problem and judge them; ``seed`` fixes the draws.

        Raises:
            RolloutError: the engine returned fewer log-probabilities than tokens, or a non-finite one.
        """
        prompts = [self.template.encode(self.tokenizer, problem) for problem in problems]
        started = time.perf_counter()
        completions = self.engine.generate(prompts, n, sampling, top_logprobs, seed)
        sampled = time.perf_counter()
        rows = [(problem, ids) for problem, ids in zip(problems, prompts, strict=True) for _ in range(n)]
        for (problem, _), completion in zip(rows, completions, strict=True):
            completion.check(problem.id)
        texts: list[str] = self.tokenizer.batch_decode([c.ids.tolist() for c in completions], skip_special_tokens=True)
        verdicts = self.pool.judge([(problem, text) for (problem, _), text in zip(rows, texts, strict=True)])
        verified = time.perf_counter()
        samples = [
            Sample(problem, ids, completion, text, verdict)
            for (problem, ids), completion, text, verdict in zip(rows, completions, texts, verdicts, strict=True)
        ]
        return Rollout(samples, n, self.engine.version, sampled - started, verified - sampled)
