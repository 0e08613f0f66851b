"""Seconds of one rollout with each engine, side by side: take new weights, then sample with log-probabilities.

    python benchmarks/rollout_engines.py --model models/SmolLM2-135M-Instruct

Rollouts of the engines alternate in one process, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import PromptTemplate, ReasoningGymPrompts, RolloutEngine, Sampling, TransformersEngine, VLLMEngine

SUMS = {"operators": ["+"], "allow_parentheses": False, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def rollouts(
    engine: RolloutEngine, policy: Policy, prompts: list[list[int]], options: argparse.Namespace
) -> Iterator[list[float]]:
    """Yield [seconds to load weights, seconds to sample, tokens] for ever."""
    sampling, version = Sampling(max_tokens=options.max_tokens), 0
    while True:
        started = time.perf_counter()
        engine.load_weights(policy.named_weights(), version)
        loaded = time.perf_counter()
        completions = engine.generate(prompts, options.samples, sampling, options.top_k, seed=version)
        yield [loaded - started, time.perf_counter() - loaded, float(sum(len(c.ids) for c in completions))]
        version += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of one rollout with each engine.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    problems = ReasoningGymPrompts("basic_arithmetic", params=SUMS).load()[: options.prompts]
    template = PromptTemplate(text="{{ problem }} Answer with only the number.")
    prompts = [template.encode(tokenizer, problem) for problem in problems]
    policy = Policy.load(PolicyConfig(options.model))
    engines: dict[str, RolloutEngine] = {"embedded": TransformersEngine(), "vLLM": VLLMEngine()}
    for engine in engines.values():
        engine.start(options.model)
    streams = {name: rollouts(engine, policy, prompts, options) for name, engine in engines.items()}
    for stream in streams.values():
        next(stream)  # the first one warms up
    figures: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in track(range(options.rounds), description="rollouts"):
        for name, stream in streams.items():
            figures[name].append(next(stream))

    rows = options.prompts * options.samples
    title = f"{rows} answers of at most {options.max_tokens} tokens, top-{options.top_k}; medians of {options.rounds} rollouts"
    table = Table("engine", "weights s", "sampling s", "rollout s", "tokens/s", "rollout, vLLM = 1", title=title)
    totals = {name: statistics.median(load + sample for load, sample, _ in rows) for name, rows in figures.items()}
    for name, runs in figures.items():
        load, sample = (statistics.median(run[i] for run in runs) for i in (0, 1))
        speed = statistics.median(tokens / seconds for _, seconds, tokens in runs)
        table.add_row(
            name, f"{load:.2f}", f"{sample:.2f}", f"{totals[name]:.2f}", f"{speed:.0f}", f"{totals[name] / totals['vLLM']:.2f}"
        )
    console = Console()
    console.print(table)
    console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
