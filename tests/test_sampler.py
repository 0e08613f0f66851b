"""The sampler: what reaches the verifiers, when, in which order, and what happens when engine or pool fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cppo_lightning.engines.engine import Completion, OnCompletion, RolloutEngine
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.rollout import PromptTemplate, Sampler, Sampling, TransformersEngine
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, Verdict, VerifierPool

PROBLEMS = [Problem(f"p{i}", ({"role": "user", "content": f"{i} + {i} = ?"},), str(2 * i)) for i in range(5)]
TEXTS = ["0", " two \n", "4 , 5 .", "é ∑ ₂", "\\boxed{8}"]
DEADLINE = 60.0  # seconds; only a defect reaches it


class Pool:
    """Judges in one other thread; the verdict's ``extracted`` is the response."""

    def __init__(self, judge: Callable[[Problem, str], Verdict] | None = None) -> None:
        self.judge = judge or (lambda problem, response: Verdict(Outcome.WRONG, 0.0, extracted=response))
        self.submitted: list[tuple[str, str]] = []
        self.futures: list[Future[Verdict]] = []
        self.thread = ThreadPoolExecutor(1)

    def submit(self, problem: Problem, response: str) -> Future[Verdict]:
        self.submitted.append((problem.id, response))
        self.futures.append(self.thread.submit(self.judge, problem, response))
        return self.futures[-1]


class Scripted(RolloutEngine):
    """Answers with ``TEXTS`` in turn, each followed by an end token; hands the last place out first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def max_top_logprobs(self) -> None: ...

    @property
    def version(self) -> int:
        return 3

    def start(self, model: str) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        top_logprobs: int = 0,
        seed: int = 0,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        assert on_completion is not None
        texts = [TEXTS[place % len(TEXTS)] for place in range(len(prompts) * n)]
        ids = [
            [*self.tokenizer.encode(text, add_special_tokens=False), cast(int, self.tokenizer.eos_token_id)] for text in texts
        ]
        completions = [self.completion(row) for row in ids]
        for place in reversed(range(len(completions))):
            on_completion(place, completions[place])
        return completions

    def completion(self, ids: list[int]) -> Completion:
        return Completion(torch.tensor(ids), torch.zeros(len(ids)), True)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_path)


def sample(engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, pool: Any, n: int = 3, max_tokens: int = 8) -> Rollout:
    sampler = Sampler(engine, tokenizer, PromptTemplate(), pool)
    return sampler.sample(PROBLEMS, n, Sampling(max_tokens=max_tokens), seed=1)


def test_samples_are_in_order_each_with_its_own_verdict(tokenizer: PreTrainedTokenizerBase) -> None:
    pool = Pool()
    rollout = sample(Scripted(tokenizer), tokenizer, pool)
    expected = [(problem.id, TEXTS[(3 * i + j) % 5]) for i, problem in enumerate(PROBLEMS) for j in range(3)]
    assert [(s.problem.id, s.text) for s in rollout.samples] == expected
    assert [s.verdict.extracted for s in rollout.samples] == [text for _, text in expected]
    assert pool.submitted == expected[::-1], "each once, as it came"
    assert [[s.problem.id for s in group] for group in rollout.groups()] == [[problem.id] * 3 for problem in PROBLEMS]
    assert rollout.version == 3
    assert rollout.num_tokens == sum(len(s.completion.ids) for s in rollout.samples)


def test_the_text_is_what_batch_decode_gives(tiny_model_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(device="cpu")
    engine.start(str(tiny_model_path))
    samples = sample(engine, tokenizer, Pool(), n=8, max_tokens=60).samples
    ids = [s.completion.ids.tolist() for s in samples]
    assert [s.text for s in samples] == tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert any(s.completion.finished for s in samples), "no response had an end token to leave out"


class Patient(TransformersEngine):
    """Once its first response is handed out, it waits for the verdict on it, and only then draws on."""

    futures: Sequence[Future[Verdict]] = ()

    def generate(self, *args: Any, on_completion: OnCompletion | None = None, **kwargs: Any) -> list[Completion]:
        assert on_completion is not None
        self.lengths: list[int] = []

        def hand_out_and_wait(place: int, completion: Completion) -> None:
            on_completion(place, completion)
            self.lengths.append(len(completion.ids))
            self.futures[0].result(timeout=DEADLINE)

        return super().generate(*args, on_completion=hand_out_and_wait, **kwargs)


class Watched(VerifierPool):
    """Keeps the futures that it gives."""

    futures: list[Future[Verdict]]

    def submit(self, problem: Problem, response: str) -> Future[Verdict]:
        future = super().submit(problem, response)
        self.futures.append(future)
        return future


def test_verdicts_come_while_later_responses_are_still_generated(
    tiny_model_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = Patient(device="cpu")
    engine.start(str(tiny_model_path))
    with Watched(MathAnswer(), workers=1) as pool:
        engine.futures = pool.futures = []
        rollout = sample(engine, tokenizer, pool, n=8, max_tokens=60)
    assert engine.lengths[0] < engine.lengths[-1] == 60
    assert len(rollout.samples) == len(pool.futures) == 40
    assert {s.verdict.outcome for s in rollout.samples} <= {Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.CORRECT}


def test_seconds_verifying_are_those_after_the_last_response(tokenizer: PreTrainedTokenizerBase) -> None:
    sampled = Event()

    class Timed(Scripted):
        def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
            completions = super().generate(*args, **kwargs)
            time.sleep(0.1)
            sampled.set()
            return completions

    def judge(problem: Problem, response: str) -> Verdict:
        assert sampled.wait(DEADLINE)
        time.sleep(0.02)
        return Verdict(Outcome.WRONG, 0.0)

    rollout = sample(Timed(tokenizer), tokenizer, Pool(judge), n=1)
    assert rollout.seconds_sampling >= 0.1
    assert rollout.seconds_verifying >= 5 * 0.02


class TestFailures:
    """A pool that never answers shows that nothing waits for it: the futures end cancelled."""

    class Deaf(Pool):
        def submit(self, problem: Problem, response: str) -> Future[Verdict]:
            self.submitted.append((problem.id, response))
            self.futures.append(Future())
            return self.futures[-1]

    def fails(
        self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, pool: Pool, message: str, submitted: int
    ) -> None:
        with pytest.raises(RolloutError, match=message):
            sample(engine, tokenizer, pool)
        assert len(pool.submitted) == submitted
        assert all(future.cancelled() for future in pool.futures)

    def test_of_the_engine(self, tokenizer: PreTrainedTokenizerBase) -> None:
        class Failing(Scripted):
            def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
                super().generate(*args, **kwargs)
                raise RolloutError("out of memory")

        self.fails(Failing(tokenizer), tokenizer, self.Deaf(), "out of memory", 15)

    def test_a_bad_response_is_not_judged(self, tokenizer: PreTrainedTokenizerBase) -> None:
        class Forgetful(Scripted):
            def completion(self, ids: list[int]) -> Completion:
                return Completion(torch.tensor(ids), torch.zeros(min(len(ids), 5)), True)

        # handed out from the end: "\\boxed{8}" has more than five tokens
        self.fails(Forgetful(tokenizer), tokenizer, self.Deaf(), r"prompt 'p4'.* 5 log-probabilities", 0)

    def test_an_engine_that_hands_out_too_few(self, tokenizer: PreTrainedTokenizerBase) -> None:
        class Sparing(Scripted):
            def generate(self, *args: Any, on_completion: OnCompletion | None = None, **kwargs: Any) -> list[Completion]:
                def only_first(place: int, completion: Completion) -> None:
                    if place == 0 and on_completion is not None:
                        on_completion(place, completion)

                return super().generate(*args, on_completion=only_first, **kwargs)

        self.fails(Sparing(tokenizer), tokenizer, self.Deaf(), r"Sparing returned 15 of 15 responses and handed 1 to", 1)

    def test_of_the_pool(self, tokenizer: PreTrainedTokenizerBase) -> None:
        class Broken(self.Deaf):
            def submit(self, problem: Problem, response: str) -> Future[Verdict]:
                future = super().submit(problem, response)
                if len(self.futures) == 15:  # the first place, which is asked for first
                    self.futures.pop().set_exception(RolloutError("verifier workers end"))
                return future

        self.fails(Scripted(tokenizer), tokenizer, Broken(), "verifier workers end", 15)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.0},
    ],
)
def test_draws_that_cannot_be_made_are_refused(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=rf"sampling\.{name} must be .*, got {value}"):
        Sampling(**bad)
