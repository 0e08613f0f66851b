"""Log-probabilities from hidden states, forward and backward: ``token_logprobs`` against the logits of the whole vocabulary.

    python benchmarks/logprobs.py
    python benchmarks/logprobs.py --device cuda --dtype bfloat16

The ways take turns, so that what else the machine does falls on all alike; ratios are taken within a round.  Extra memory is
the peak of a round above what was held before it, less the gradients of hidden states and weight, which every way leaves
behind.  On a CPU it is of the resident set (Linux alone), freed memory given back before; on CUDA, of what torch's allocator
handed out.  On CUDA Liger's fused loss joins in where it is installed; it gives the sum alone, so no weight per token either.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler reports each start and stop

import torch
from measure import machine, peak_extra_memory, seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import profile

from cppo_lightning.logprobs import Head, token_logprobs

TOP_K = 20
PRODUCTS = {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
# the bounds that the project sets itself, as multiples of the whole logits' time and memory
TIME_LIMIT = {"cpu": 1.15, "cuda": 1.1}
MEMORY_LIMIT = 0.1


@dataclass(frozen=True)
class Problem:
    """Shapes: N tokens, H hidden size, V vocabulary."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [N]
    topk_ids: Tensor  # [N, TOP_K]

    @classmethod
    def random(cls, tokens: int, size: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Problem:
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(tokens, size, generator=g), torch.randn(vocabulary, size, generator=g).mul_(size**-0.5)
        ids = torch.randint(vocabulary, (tokens, 1 + TOP_K), generator=g).to(device)
        hidden, weight = (value.to(device, dtype).requires_grad_() for value in (hidden, weight))
        return cls(hidden, weight, ids[:, 0].contiguous(), ids[:, 1:].contiguous())

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.grad.nbytes for leaf in (self.hidden, self.weight) if leaf.grad is not None)

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


def log_softmax(p: Problem) -> Tensor:
    return (p.hidden.float() @ p.weight.float().T).log_softmax(-1)


def whole(p: Problem) -> Tensor:
    return log_softmax(p).gather(-1, p.ids[:, None]).squeeze(-1)


def whole_with_entropy(p: Problem) -> Tensor:
    log_pi = log_softmax(p)
    with torch.no_grad():
        torch.linalg.vecdot(log_pi.exp(), log_pi)
    return log_pi.gather(-1, p.ids[:, None]).squeeze(-1)


def ours(p: Problem) -> Tensor:
    return token_logprobs(p.hidden, Head(p.weight), p.ids).logp


def ours_with_topk(p: Problem) -> Tensor:
    return token_logprobs(p.hidden, Head(p.weight), p.ids, p.topk_ids).logp


def liger(p: Problem) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return -functional.liger_fused_linear_cross_entropy(p.hidden, p.weight, p.ids, reduction="sum")


@dataclass(frozen=True)
class Way:
    """One of those compared.

    Args:
        logp: log-probabilities ``[N]``, or their sum.
        products: matrix products of N x H x V that it takes.
        trains: whether there is a backward pass.
    """

    logp: Callable[[Problem], Tensor]
    products: int
    trains: bool = True

    def run(self, problem: Problem) -> Tensor:
        with torch.set_grad_enabled(self.trains):
            logp = self.logp(problem)
            if self.trains:
                logp.sum().backward()
        return logp.detach()


BASE, BASE_FORWARD = "logits, log_softmax, gather", "the same, forward alone"
WAYS = {
    BASE: Way(whole, 3),
    "the same, entropy too": Way(whole_with_entropy, 3),
    "token_logprobs (entropy too)": Way(ours, 4),
    f"token_logprobs, top-{TOP_K} too": Way(ours_with_topk, 4),
    BASE_FORWARD: Way(whole, 1, trains=False),
    "token_logprobs, forward alone": Way(ours, 1, trains=False),
}
LIGER = {"Liger's fused cross-entropy": Way(liger, 3)}


@dataclass(frozen=True)
class Measurement:
    """Of one round of one way."""

    seconds: float
    extra_bytes: float
    total: float  # sum of the log-probabilities


def measure(way: Way, problem: Problem) -> Measurement:
    problem.forget()
    found: list[Tensor] = []
    with peak_extra_memory(problem.hidden.device) as peak:
        taken = seconds(lambda: found.append(way.run(problem)), problem.hidden.device)
    return Measurement(taken, peak.bytes - problem.gradient_bytes, float(found[0].double().sum()))


def share_of_products(way: Way, problem: Problem) -> float:
    """Of the time of torch's operators in a round, the part that goes into matrix products."""
    problem.forget()
    with profile() as record:
        way.run(problem)
    events = record.key_averages()
    times = {e.key: e.self_device_time_total if problem.hidden.is_cuda else e.self_cpu_time_total for e in events}
    return sum(times.get(name, 0.0) for name in PRODUCTS) / sum(times.values())


def row(name: str, way: Way, rounds: list[dict[str, Measurement]], work: float) -> list[str]:
    base = BASE if way.trains else BASE_FORWARD
    taken = statistics.median(r[name].seconds for r in rounds)
    extra = max(r[name].extra_bytes for r in rounds)
    return [
        f"{taken:.3g}",
        f"{statistics.median(r[name].seconds / r[base].seconds for r in rounds):.2f}",
        f"{way.products * work / taken / 1e9:.0f}",
        f"{extra / 1e6:.0f}",
        f"{extra / max(r[base].extra_bytes for r in rounds):.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of log-probabilities from hidden states.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of hidden states and weight")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    ways = WAYS | LIGER if with_liger else WAYS

    shape = (options.hidden, options.vocabulary, getattr(torch, options.dtype), device)
    small, problem = Problem.random(64, *shape), Problem.random(options.tokens, *shape)
    for way in ways.values():
        way.run(small)  # the first call of each is slower
    turns = [(number, name) for number in range(options.rounds) for name in ways]
    rounds: list[dict[str, Measurement]] = [{} for _ in range(options.rounds)]
    for number, name in track(turns, "rounds"):
        rounds[number][name] = measure(ways[name], problem)

    table = Table(title=f"{machine(device)}\n{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocabulary}")
    for column in ("", "seconds", "whole = 1", "GFLOP/s", "extra MB", "whole = 1"):
        table.add_column(column, justify="right" if column else "left")
    work = 2.0 * options.tokens * options.hidden * options.vocabulary
    for name, way in ways.items():
        table.add_row(name, *row(name, way, rounds, work))
    console = Console()
    console.print(table)
    far = max(abs(r[name].total / r[BASE].total - 1) for r in rounds for name in ways)
    console.print(f"sums of log-probabilities differ by at most {far:.1e} of themselves")
    console.print(f"matrix products take {share_of_products(Way(ours, 4), problem):.0%} of token_logprobs")
    console.print(f"bounds: time {TIME_LIMIT.get(device.type, 1.15)}, memory {MEMORY_LIMIT} of the whole logits'")


if __name__ == "__main__":
    main()
