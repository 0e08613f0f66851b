"""How much of what a model computes is real: micro-batches of log-normal responses, and the work of several ranks.

    python benchmarks/micro_batches.py

Lengths alone are drawn, no model is loaded: work is counted in floating-point operations of Qwen3-1.7B's forward pass.
Responses have the given mean and sigma 1 (over groups and within a group alike), prompts 100 to 200 tokens, groups 8 responses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from measure import in_turns, machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.rollout.dealing import dealt
from cppo_lightning.sequences import MicroBatch, Work, micro_batches

QWEN = Work(per_token=2 * 1.41e9, per_pair=4 * 28 * 16 * 128)
FLEX = Work(QWEN.per_token, QWEN.per_pair, skips_hidden=True)
SAMPLES = 8
LIMIT = 8192  # tokens of a response
# responses per rank and update, mean tokens of a response, model.micro_batch_tokens
MINIBATCHES = (
    *((16, 300, 4096), (32, 300, 4096), (64, 300, 16384), (256, 300, 16384)),
    *((32, 1500, 16384), (64, 1500, 16384), (256, 1500, 16384), (256, 1500, 65536), (64, 3000, 32768), (256, 40, 4096)),
)
PLANS = ((64, 2), (128, 4), (512, 16))  # prompts per rollout, updates
RANKS = (2, 4, 8)
SPEED = 4e14  # operations per second, 40 % of a H100's peak in bf16


@dataclass(frozen=True)
class Lengths:
    prompts: torch.Tensor  # [G]
    responses: torch.Tensor  # [G, SAMPLES]

    @classmethod
    def drawn(cls, groups: int, mean: float, alike: float, seed: int) -> Lengths:
        """``alike`` is the share of the logarithm's variance that lies between groups."""
        g = torch.Generator().manual_seed(seed)
        spread = alike**0.5 * torch.randn(groups, 1, generator=g)
        spread = spread + (1 - alike) ** 0.5 * torch.randn(groups, SAMPLES, generator=g)
        responses = (mean * (spread - 0.5).exp()).long().clamp(1, LIMIT)  # of sigma 1 the mean is exp(1/2)
        return cls(torch.randint(100, 201, (groups,), generator=g), responses)

    def __getitem__(self, groups: Sequence[int]) -> Lengths:
        return Lengths(self.prompts[groups], self.responses[groups])

    def batch(self) -> RolloutBatch:
        groups = torch.arange(len(self.prompts)).repeat_interleave(SAMPLES)
        prompts, responses = self.prompts[groups], self.responses.flatten()
        places = torch.arange(int(responses.max()))
        ones, logp = torch.ones(len(groups)), torch.zeros(len(groups), len(places))
        return RolloutBatch(
            prompt_ids=torch.zeros(len(groups), 200, dtype=torch.int64),
            prompt_mask=torch.arange(200) >= 200 - prompts[:, None],
            response_ids=logp.long(),
            response_mask=places < responses[:, None],
            rollout_logp=logp,
            advantages=ones,
            rewards=ones,
            group=groups,
            policy_version=groups,
        )


def as_sampled(batch: RolloutBatch, budget: int) -> list[int]:
    """Padded tokens of each part, if every row is padded to the longest and rows keep their order."""
    longest = int((batch.prompt_mask.sum(-1) + batch.response_mask.sum(-1)).max())
    rows = max(1, budget // longest)
    return [len(part) * longest for part in torch.arange(len(batch)).split(rows)]


def real(parts: Sequence[MicroBatch]) -> float:
    read = [part.sequences.branch >= 0 for part in parts]
    return sum(int(mask.sum()) for mask in read) / sum(mask.numel() for mask in read)


def shares(batch: RolloutBatch, budget: int) -> list[float]:
    """Real ones of the computed tokens, and passes: as sampled, cut, behind shared prompts, packed; passes without padding, and
    the tokens computed behind shared prompts of those computed as sampled."""
    naive = as_sampled(batch, budget)
    ways = [micro_batches(batch, budget, way) for way in (None, QWEN, FLEX)]
    tokens = int(batch.prompt_mask.sum() + batch.response_mask.sum())
    computed = sum(part.sequences.branch.numel() for part in ways[1]) / sum(naive)
    return [tokens / sum(naive), *map(real, ways), len(naive), *map(len, ways), tokens / budget, computed]


def work(part: MicroBatch) -> float:
    """Padding and hidden pairs included."""
    return QWEN.of(*part.sequences.branch.shape)


def padding(draws: int, rounds: int) -> Table:
    table = Table(title="Share of computed tokens that are real; passes; the time that cutting takes")
    for name in ("responses", "mean", "budget", "as sampled", "cut", "shared", "packed", "tokens, as sampled = 1", "passes"):
        table.add_column(name, justify="right")
    table.add_column("ms", justify="right")
    table.add_column("of a forward pass", justify="right")
    for count, mean, budget in track(MINIBATCHES, "minibatches"):
        batches = [Lengths.drawn(count // SAMPLES, mean, 0.5, seed).batch() for seed in range(draws)]
        found = [shares(batch, budget) for batch in batches]
        *real, naive, cut, shared, packed, ideal, computed = [statistics.fmean(column) for column in zip(*found, strict=True)]
        taken = min(in_turns({"cut": partial(micro_batches, batches[0], budget, QWEN)}, range(rounds))["cut"])
        table.add_row(
            *map(str, (count, mean, budget)),
            *(f"{share:.2f}" for share in (*real, computed)),
            f"{naive:.1f} / {cut:.1f} / {shared:.1f} / {packed:.1f} ({ideal:.1f})",
            *(f"{1e3 * taken:.1f}", f"{taken / (sum(map(work, micro_batches(batches[0], budget, QWEN))) / SPEED):.1%}"),
        )
    table.caption = "passes: as sampled / cut / shared / packed (all tokens over the budget)"
    return table


def balance(draws: int) -> Table:
    table = Table(
        title="Work of the busiest rank, the mean rank's = 1, summed over the updates of a rollout; mean 1,500 tokens"
    )
    heads = ("ranks", "prompts", "updates", "groups alike", "groups in turn", "dealt", "dealt, pass by pass", "blank passes")
    for name in (*heads, "rows exchanged"):
        table.add_column(name, justify="right")
    cases = [(ranks, *plan, alike) for ranks in RANKS for plan in PLANS for alike in (0.0, 0.5)]
    for ranks, prompts, updates, alike in track(cases, "ranks"):
        found = [one_rollout(ranks, prompts, updates, alike, seed) for seed in range(max(2, draws * 64 // prompts))]
        turn, ours, passes, blank, exchanged = [statistics.fmean(column) for column in zip(*found, strict=True)]
        table.add_row(
            *map(str, (ranks, prompts, updates)),
            *(f"{alike:.0%}", f"{turn:.2f}", f"{ours:.2f}", f"{passes:.2f}", f"{blank:.0%}", f"{exchanged:.2f}"),
        )
    table.caption = "groups alike: share of the variance of log length that lies between groups"
    return table


def one_rollout(ranks: int, prompts: int, updates: int, alike: float, seed: int) -> tuple[float, ...]:
    """Work of the busiest rank over the mean's: groups in turn, dealt, dealt with ranks waiting for each other at every pass;
    share of passes that are blank; and if each update's rows were exchanged between ranks, the longest to the least busy."""
    each = prompts // ranks
    drawn = [Lengths.drawn(each, 1500, alike, 1000 * seed + rank) for rank in range(ranks)]
    turns = [share.tolist() for share in torch.arange(each).tensor_split(updates)]
    busiest, mean, by_pass, passes, slots, exchanged = [0.0, 0.0], [0.0, 0.0], 0.0, 0, 0, 0.0
    ours = [dealt(dict(enumerate(lengths.responses.sum(-1).tolist())), updates) for lengths in drawn]
    for update in range(updates):
        in_turn, parts = (
            [cut(lengths[mine[update]]) for lengths, mine in zip(drawn, groups, strict=True)]
            for groups in ([turns] * ranks, ours)
        )
        for way, loads in enumerate([sum(rank) for rank in found] for found in (in_turn, parts)):
            busiest[way] += max(loads)
            mean[way] += statistics.fmean(loads)
        count = max(map(len, parts))
        by_pass += sum(max(rank[i] if i < len(rank) else 0.0 for rank in parts) for i in range(count))
        passes, slots = passes + sum(map(len, parts)), slots + count * ranks
        exchanged += spread([row for rank in zip(drawn, ours, strict=True) for row in alone(rank[0][rank[1][update]])], ranks)
    return busiest[0] / mean[0], busiest[1] / mean[1], by_pass / mean[1], 1 - passes / slots, exchanged / updates


def cut(lengths: Lengths) -> list[float]:
    parts = micro_batches(lengths.batch(), 16384, QWEN) if len(lengths.prompts) else []
    return [work(part) for part in parts]


def alone(lengths: Lengths) -> list[float]:
    """Work of each row without padding."""
    return [QWEN.of(1, length) for length in (lengths.prompts[:, None] + lengths.responses).flatten().tolist()]


def spread(loads: list[float], ranks: int) -> float:
    """The busiest rank over the mean when each load goes to the least busy, the largest first."""
    totals = [0.0] * ranks
    for load in sorted(loads, reverse=True):
        totals[totals.index(min(totals))] += load
    return max(totals) / statistics.fmean(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description="Padding, passes and the balance of ranks, from drawn lengths.")
    parser.add_argument("--draws", type=int, default=20, help="minibatches or rollouts that a figure is the mean of")
    parser.add_argument("--rounds", type=int, default=8, help="calls that the fastest is taken of")
    options = parser.parse_args()
    torch.set_num_threads(1)  # many small tensors
    tables = [padding(options.draws, options.rounds), balance(options.draws)]
    console = Console()
    for table in tables:
        console.print(table)
    console.print(machine())


if __name__ == "__main__":
    main()
