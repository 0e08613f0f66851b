"""Forward and backward pass over one group: every response behind a prompt of its own, or as many behind one as is less work.

    python benchmarks/shared_prompts.py --model models/SmolLM2-135M-Instruct

The two ways alternate, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from measure import in_turns, machine, ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.sequences import MicroBatch, Work, micro_batches

SHAPES = ((45, 10), (45, 24), (200, 24), (200, 100), (200, 400), (45, 400))


def group(prompt: int, response: int, samples: int, vocabulary: int) -> RolloutBatch:
    """``samples`` random responses to one random prompt."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = torch.ones(samples), torch.ones(samples, response)
    return RolloutBatch(
        prompt_ids=torch.randint(vocabulary, (1, prompt), generator=generator).expand(samples, prompt),
        prompt_mask=torch.ones(samples, prompt, dtype=torch.bool),
        response_ids=torch.randint(vocabulary, (samples, response), generator=generator),
        response_mask=tokens.bool(),
        rollout_logp=-tokens,
        advantages=rows,
        rewards=rows,
        group=torch.zeros(samples, dtype=torch.int64),
        policy_version=torch.zeros(samples, dtype=torch.int64),
    )


def train(policy: Policy, parts: list[MicroBatch]) -> None:
    policy.zero_grad()
    for part in parts:
        policy(part.batch, 1.0, part.sequences).logp.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description="What it saves to compute a group's prompt once.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    policy = Policy.load(PolicyConfig(options.model))
    table = Table(title=machine())
    for name in ("prompt", "response", "behind one prompt", "tokens", "seconds", "alone = 1"):
        table.add_column(name, justify="right")
    for prompt, response in track(SHAPES, "shapes"):
        batch = group(prompt, response, options.samples, 1000)
        ways: list[Work | None] = [None, policy.work]
        parts = [micro_batches(batch, options.micro_batch_tokens, work) for work in ways]
        train(policy, parts[1])  # the first pass of a shape is slower
        calls = {name: partial(train, policy, way) for name, way in zip(("alone", "shared"), parts, strict=True)}
        taken = in_turns(calls, range(options.rounds))
        shared = parts[1]
        table.add_row(
            *(str(prompt), str(response), str(max(part.sequences.branches for part in shared))),
            " / ".join(str(sum(int((part.sequences.branch >= 0).sum()) for part in way)) for way in parts),
            " / ".join(f"{statistics.median(rounds):.2f}" for rounds in taken.values()),
            f"{ratio(taken['shared'], taken['alone']):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
