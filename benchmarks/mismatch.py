"""What engine and trainer disagree on at equal weights, by engine, dtype and temperature, and what that costs a trust region.

    python benchmarks/mismatch.py --model models/SmolLM2-135M-Instruct

The trainer is float32.  Each row is one rollout of the unchanged model; its metrics are those of the callback ``Mismatch``
under CPPO with the paper's delta, delta_b and w_min.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import torch
from measure import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cppo_lightning.batch import RolloutBatch, TokenStats
from cppo_lightning.callbacks.mismatch import MAXIMA, MEANS, mismatch_maxima, mismatch_totals
from cppo_lightning.callbacks.weight_sync_canary import as_batch
from cppo_lightning.metrics import Maxima, WeightedMeans, bin_names
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import PromptTemplate, RolloutEngine, Sampling, TransformersEngine, VLLMEngine
from cppo_lightning.sequences import micro_batches
from cppo_lightning.trust_regions import CPPO
from cppo_lightning.verifiers import Problem

QUESTIONS = (
    "Why is the sky blue?",
    "A shop sells pens at 3 dollars and books at 8. What do 4 pens and 2 books cost?",
    "Write a short story about a lighthouse keeper.",
    "Explain how to sort a list of numbers.",
)
BINS = 5
EXTRA = "net of noise"  # mean of max(D_t - noise, 0) over mean D_t, noise being the mean itself
COLUMNS = {
    "log-prob gap mean": "mismatch/logp_gap_mean",
    "max": "mismatch/logp_gap_max",
    "by fifths of the response": "",
    "k3": "mismatch/k3",
    "chi2": "mismatch/chi2",
    "ESS": "mismatch/ess",
    "ESS of responses": "mismatch/sequence_ess",
    "top-20 mass": "mismatch/captured_mass",
    "D mean": "mismatch/divergence_mean",
    "D max": "mismatch/divergence_max",
    "of delta, mean": "mismatch/threshold_spent_mean",
    "of delta, max": "mismatch/threshold_spent_max",
    "of delta_b": "mismatch/budget_rate",
    "of a budget, mean": "mismatch/budget_spent_mean",
    "of a budget, max": "mismatch/budget_spent_max",
    "masked": "mismatch/masked",
    "left by max(D - mean, 0)": EXTRA,
}


def engines() -> Iterator[tuple[str, RolloutEngine]]:
    yield "transformers float32", TransformersEngine("float32")
    yield "transformers bfloat16", TransformersEngine("bfloat16")
    if importlib.util.find_spec("vllm") is not None:
        yield "vLLM float32", VLLMEngine("float32", max_model_len=1024)
        yield "vLLM bfloat16", VLLMEngine("bfloat16", max_model_len=1024)


@torch.no_grad()
def stats_of(policy: Policy, batch: RolloutBatch, temperature: float) -> TokenStats:
    """The advantages' signs alternate: half of the responses are pushed up, half down."""
    output = policy(batch, temperature)
    sign = torch.where(batch.group % 2 == 0, 1.0, -1.0)[:, None].expand_as(batch.rollout_logp)
    return TokenStats(
        *(batch.response_ids, output.logp, batch.rollout_logp, sign, batch.response_mask),
        *(batch.topk_ids, batch.topk_rollout_logp, output.topk_logp),
    )


def measure(
    engine: RolloutEngine, policy: Policy, prompts: list[list[int]], samples: int, sampling: Sampling
) -> dict[str, float]:
    """The metrics of one rollout, by tag, and its ``tokens``."""
    region = CPPO(adaptive=False)
    completions = engine.generate(prompts, samples, sampling, region.top_k)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    batch = as_batch(repeated, completions, 0, region.top_k)
    means = WeightedMeans([*MEANS, EXTRA, *(f"mismatch/logp_gap_at/{name}" for name in bin_names(BINS))])
    maxima, every = Maxima(MAXIMA), []
    for part in micro_batches(batch, 4096):
        stats = stats_of(policy, part.batch, sampling.temperature)
        gate = region(stats)
        means.update(mismatch_totals(stats, gate, region.delta, BINS))
        maxima.update(mismatch_maxima(stats, gate, region.delta))
        every.append(gate.diagnostics["divergence"][stats.mask])
    divergence = torch.cat(every)
    left = (divergence - divergence.mean()).clamp(min=0)
    means.update({EXTRA: (left.sum(), divergence.sum())})
    return means.compute() | maxima.compute() | {"tokens": float(len(divergence))}


def encoded(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    problems = [Problem(question, ({"role": "user", "content": question},), "") for question in QUESTIONS]
    return [PromptTemplate().encode(tokenizer, problem) for problem in problems]


def main() -> None:
    parser = argparse.ArgumentParser(description="Engine against trainer at equal weights.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=2, help="responses to each of four questions; docs: 4")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 1.0])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = encoded(tokenizer)
    policy = Policy.load(PolicyConfig(options.model))
    found: dict[str, dict[str, float]] = {}
    for name, engine in track(engines(), description="engines", total=4):
        engine.start(options.model)
        engine.load_weights(policy.named_weights(), 0)
        for temperature in options.temperatures:
            sampling = replace(Sampling(options.max_tokens), temperature=temperature)
            found[f"{name}, T {temperature:g}"] = measure(engine, policy, prompts, options.samples, sampling)
        engine.close()
    table = Table(
        "metric", *found, title="Engine against a float32 trainer, equal weights; delta 0.15, delta_b 0.02, w_min 0.8"
    )
    for title, tag in {"tokens": "tokens", **COLUMNS}.items():
        table.add_row(title, *(cell(values, tag) for values in found.values()))
    console = Console(width=200)
    console.print(table)
    console.print(machine())


def cell(values: dict[str, float], tag: str) -> str:
    if not tag:
        return " ".join(f"{values[f'mismatch/logp_gap_at/{name}']:.1g}" for name in bin_names(BINS))
    return f"{values[tag]:.3g}"


if __name__ == "__main__":
    main()
