"""Seconds of one rollout with each engine, side by side: take new weights, then sample with log-probabilities.

    python benchmarks/rollout_engines.py --model models/SmolLM2-135M-Instruct

Rollouts take turns in one process, so that what else the machine does falls on all alike.  ``LLM.generate`` is vLLM by itself,
on the same instance, without weights to take.  The second table says where the time of ``VLLMEngine``'s rollouts goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from measure import in_turns, machine, ratio
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from cppo_lightning.engines.vllm.capture import CapturedResponse
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import PromptTemplate, ReasoningGymPrompts, RolloutEngine, Sampling, TransformersEngine, VLLMEngine

if TYPE_CHECKING:
    from vllm import LLM

SUMS = {"operators": ["+"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
# so hot that hardly any answer ends before its limit, and all engines draw the same number of tokens
TEMPERATURE = 2.0
PARTS = ("weights", "vLLM's core", "capture", "conversion")


@dataclass
class Task:
    """What every engine is given, and how many tokens each drew last."""

    policy: Policy
    prompts: list[list[int]]
    samples: int
    sampling: Sampling
    top_k: int
    seed: int = 0
    tokens: dict[str, int] = field(default_factory=dict)

    def rollout(self, name: str, engine: RolloutEngine) -> None:
        """Weights, then samples."""
        self.seed += 1
        engine.load_weights(self.policy.named_weights(), self.seed)
        drawn = engine.generate(self.prompts, self.samples, self.sampling, self.top_k, self.seed)
        self.tokens[name] = sum(len(completion.ids) for completion in drawn)

    def plain(self, name: str, llm: LLM) -> None:
        """The same samples by vLLM alone, with as many log-probabilities and without text."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(
            n=self.samples,
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            logprobs=self.top_k,
            detokenize=False,
        )
        llm.reset_prefix_cache()
        requests: list[Any] = [tokens_input(prompt) for prompt in self.prompts]
        drawn = llm.generate(requests, params, use_tqdm=False)
        self.tokens[name] = sum(len(output.token_ids) for request in drawn for output in request.outputs)


@contextmanager
def spent(seconds: dict[str, float], engine: VLLMEngine, llm: LLM) -> Iterator[None]:
    """Add to ``seconds`` what the block spends within calls of vLLM and of our own, by their names in the table."""
    core = llm.llm_engine.engine_core
    calls: list[tuple[str, Any, str]] = [
        ("weights", engine, "load_weights"),
        ("vLLM's core", llm.llm_engine.input_processor, "process_inputs"),
        ("vLLM's core", core, "add_request"),
        ("vLLM's core", core, "get_output"),
        ("capture", CapturedResponse, "add"),
        ("conversion", CapturedResponse, "completion"),
    ]

    def timed(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    with ExitStack() as patches:
        for name, owner, method in calls:
            patches.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of one rollout with each engine.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 128, 256], help="tokens of an answer")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8, help="of the shortest answers; longer ones draw as many tokens")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    problems = ReasoningGymPrompts("basic_arithmetic", params=SUMS).load()[: options.prompts]
    template = PromptTemplate(text="{{ problem }} Answer with only the number.")
    prompts = [template.encode(tokenizer, problem) for problem in problems]
    policy = Policy.load(PolicyConfig(options.model))
    embedded, vllm = TransformersEngine(), VLLMEngine(max_top_logprobs=options.top_k)
    for engine in (embedded, vllm):
        engine.start(options.model)

    of = f"{options.prompts * options.samples} answers, top-{options.top_k}"
    speeds = Table("tokens", "engine", "rollouts", "seconds", "tokens/s", "VLLMEngine = 1", title=of, box=MARKDOWN)
    shares = Table("tokens", "seconds", *PARTS, "rest", "bookkeeping", title="Where a rollout of VLLMEngine goes", box=MARKDOWN)
    for length in options.lengths:
        task = Task(policy, prompts, options.samples, Sampling(length, TEMPERATURE), options.top_k)
        measure(task, embedded, vllm, max(1, options.rounds * options.lengths[0] // length), speeds, shares)
    console = Console(width=120)
    for table in (speeds, shares):
        console.print(table)
    console.print(machine())
    for engine in (embedded, vllm):
        engine.close()


def measure(task: Task, embedded: TransformersEngine, vllm: VLLMEngine, rounds: int, speeds: Table, shares: Table) -> None:
    """Add the figures of one length to both tables."""
    llm, length = vllm._loaded(), task.sampling.max_tokens  # one vLLM for both: two do not fit in a process
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def watched() -> None:
        with spent(seconds, vllm, llm):
            task.rollout("VLLMEngine", vllm)

    calls = {
        "embedded": partial(task.rollout, "embedded", embedded),
        "VLLMEngine": watched,
        "LLM.generate": partial(task.plain, "LLM.generate", llm),
    }
    if not speeds.rows:
        for call in calls.values():
            call()  # the first one warms up
        seconds.update(dict.fromkeys(PARTS, 0.0))
    taken = in_turns(calls, track(range(rounds), f"{length} tokens"))
    for name, times in taken.items():
        median = statistics.median(times)
        slower = ratio(times, taken["VLLMEngine"])
        speeds.add_row(f"{length}", name, f"{rounds}", f"{median:.2f}", f"{task.tokens[name] / median:.0f}", f"{slower:.2f}")
    total = sum(taken["VLLMEngine"])
    rest = total - sum(seconds.values())
    ours = total - seconds["weights"] - seconds["vLLM's core"]
    parts = (total, *seconds.values(), rest)
    shares.add_row(f"{length}", *(f"{part / rounds:.3f}" for part in parts), f"{ours / total:.2%}")


if __name__ == "__main__":
    main()
