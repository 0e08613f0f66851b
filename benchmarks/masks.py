"""Time and peak memory of every trust region under configs/trust_region, as the responses become more and longer.

    python benchmarks/masks.py
    python benchmarks/masks.py --only ppo_clip cppo_binary cppo_binary_fixed --rounds 30

Trust regions take turns within a round, so that what else the machine does falls on all alike; ratios are taken within a round.
On a CPU with glibc, freed memory is kept for the next call, as torch does on a GPU; ``--fresh-pages`` shows what it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler reports each start and stop

import torch
import yaml
from jsonargparse import ArgumentParser
from measure import exponent, in_turns, keep_freed_memory, machine, ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.divergences import BinaryTV
from cppo_lightning.trust_regions import CPPO, PPOClip, TrustRegion

CONFIGS = Path(__file__).parents[1] / "configs" / "trust_region"
SHAPES = [(8, 1024), (16, 2048), (32, 4096), (64, 8192), (64, 16384)]
CLIP = "ppo_clip"
# the bounds that the project sets itself, as multiples of PPOClip's time
LIMITS = {"cppo_binary_fixed": 3.0, "cppo_binary": 5.0}
EXPONENT_LIMIT = 1.05


def trust_regions() -> dict[str, TrustRegion]:
    """By the name of their config, those that say the same only once, and CPPO with a fixed budget on the binary TV."""
    parser = ArgumentParser()
    parser.add_argument("--trust_region", type=TrustRegion)
    found: dict[str, TrustRegion] = {CLIP: PPOClip(), "cppo_binary_fixed": CPPO(BinaryTV(), delta_b=0.015, adaptive=False)}
    for file in sorted(CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(file.read_text())["model"]["trust_region"]
        region = parser.instantiate(parser.parse_object({"trust_region": settings}))["trust_region"]
        if region not in found.values():
            found[file.stem] = region
    return found


def responses(rows: int, width: int, k: int, device: torch.device) -> TokenStats:
    """Right-padded responses of a quarter to the whole of the width, some of their tokens far from mu."""
    g = torch.Generator().manual_seed(0)
    top = torch.randn(rows, width, k + 1, generator=g).mul_(3).log_softmax(-1)
    rollout_logp, rest = top[..., 0].contiguous(), top[..., 1:].contiguous()
    lengths = torch.randint(width // 4, width + 1, (rows, 1), generator=g)
    lengths[0] = width
    stats = TokenStats(
        response_ids=torch.full((rows, width), k),
        logp=(rollout_logp + 0.1 * torch.randn(rows, width, generator=g)).clamp_(max=0),
        rollout_logp=rollout_logp,
        advantages=torch.randn(rows, 1, generator=g).expand(rows, width),
        mask=torch.arange(width) < lengths,
        topk_ids=torch.arange(k).expand(rows, width, k).contiguous(),
        topk_rollout_logp=rest,
        topk_logp=rest + 0.1 * torch.randn(rest.shape, generator=g),
    )
    return replace(stats, **{name: value.to(device) for name, value in vars(stats).items() if value is not None})


def peak_bytes(call: Callable[[], Gate], device: torch.device) -> int:
    """Most memory that a call holds at once, its result included and its arguments not, as torch's allocator counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    del result
    changes = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e["name"] == "[memory]")
    return max(accumulate(change for _, _, change in changes), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of every trust region.")
    parser.add_argument("--only", nargs="+", default=[], help="names of configs; PPO's clip is always there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh-pages", action="store_true", help="leave the C library's allocator as it is")
    options = parser.parse_args()
    kept = not options.fresh_pages and keep_freed_memory()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    regions = trust_regions()
    if unknown := set(options.only) - set(regions):
        parser.error(f"no trust region {sorted(unknown)}; there are {', '.join(regions)}")
    regions = {name: r for name, r in regions.items() if not options.only or name in {CLIP, *options.only}}
    k = max(region.top_k for region in regions.values()) or 1

    times: dict[str, list[list[float]]] = {name: [] for name in regions}  # by shape, by round
    peaks: dict[str, float] = {}
    for rows, width in SHAPES:
        stats = responses(rows, width, k, device)
        calls: dict[str, Callable[[], Gate]] = {name: partial(region, stats) for name, region in regions.items()}
        for name, call in calls.items():
            peaks[name] = peak_bytes(call, device) / (rows * width)  # warms up as well; the last shape's stands
        repeats = max(1, 2**17 // (rows * width))  # a few milliseconds at least
        rounds = track(range(options.rounds), description=f"[{rows}, {width}]")
        for name, taken in in_turns(calls, rounds, device, repeats).items():
            times[name].append(taken)

    tokens = [rows * width for rows, width in SHAPES]
    title = f"Milliseconds per call, fastest of {options.rounds} rounds; ratio (median) and memory are the largest shape's"
    head = ["trust region", *(f"[{rows}, {width}]" for rows, width in SHAPES)]
    table = Table(*head, "exponent", "clip = 1", "limit", "bytes/token", title=title)
    for name, shapes in times.items():
        fastest = [min(rounds) for rounds in shapes]
        slower = ratio(shapes[-1], times[CLIP][-1])
        growth, limit = exponent(tokens, fastest), LIMITS.get(name)
        cells = [f"{1e3 * best:.3g}" for best in fastest]
        cells += [mark(growth, EXPONENT_LIMIT), mark(slower, limit), "" if limit is None else f"{limit:g}"]
        table.add_row(name, *cells, f"{peaks[name]:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{machine(device)}, {'freed memory kept' if kept else 'allocator as it is'}")


def mark(value: float, limit: float | None) -> str:
    return f"{value:.2f}" if limit is None or value <= limit else f"[red]{value:.2f} (over {limit:g})[/red]"


if __name__ == "__main__":
    main()
