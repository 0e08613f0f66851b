"""What log-probabilities on their way from a vLLM server to tensors cost, beside the time that the server samples.

    python benchmarks/server_answers.py --model models/SmolLM2-135M-Instruct

CPU seconds are those of whole processes: the trainer's, which asks and gets tensors; the server's API process, which makes the
answers; and its engine, which samples.  At K = 0 the first two do all that they do at K, but for the top-K log-probabilities.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from measure import machine
from rich.console import Console
from rich.table import Table

from cppo_lightning.engines.engine import Sampling
from cppo_lightning.engines.vllm_server import VLLMServerEngine


def roles() -> dict[str, list[psutil.Process]]:
    """This process, and those of its server: a supervisor's child that answers, and what that has started."""
    (supervisor,) = psutil.Process().children()
    (api,) = supervisor.children()
    return {"trainer": [psutil.Process()], "API": [api], "engine": api.children(recursive=True)}


@contextmanager
def measured(figures: dict[str, float]) -> Iterator[None]:
    """Put wall seconds and each process's CPU seconds into ``figures``."""

    def cpu() -> dict[str, float]:
        return {name: sum(sum(process.cpu_times()[:2]) for process in each) for name, each in processes.items()}

    processes = roles()
    before, started = cpu(), time.perf_counter()
    yield
    figures["wall"] = time.perf_counter() - started
    figures |= {name: seconds - before[name] for name, seconds in cpu().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What log-probabilities cost on their way from a vLLM server to tensors.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=20)
    options = parser.parse_args()

    engine = VLLMServerEngine(max_top_logprobs=options.top_k, max_model_len=options.max_tokens + 64)
    prompts = [list(range(1000 + 40 * i, 1040 + 40 * i)) for i in range(options.prompts)]
    # so hot that hardly any sample ends before its limit
    sampling = Sampling(max_tokens=options.max_tokens, temperature=2.0)
    title = f"{options.prompts * options.samples} samples of {options.max_tokens} tokens, CPU seconds by process"
    table = Table("K", "tokens", "wall s", "engine", "API", "trainer", "API + trainer, of the wall time", title=title)
    engine.start(options.model)
    try:
        engine.generate(prompts[:1], 1, Sampling(max_tokens=16), options.top_k)  # warms up
        for top_k in (0, options.top_k):
            figures: dict[str, float] = {}
            with measured(figures):
                completions = engine.generate(prompts, options.samples, sampling, top_k)
            wall, api, trainer = (figures[name] for name in ("wall", "API", "trainer"))
            table.add_row(
                f"{top_k}",
                f"{sum(len(completion.ids) for completion in completions)}",
                *(f"{seconds:.2f}" for seconds in (wall, figures["engine"], api, trainer)),
                f"{(api + trainer) / wall:.1%}",
            )
    finally:
        engine.close()
    console = Console()
    console.print(table)
    console.print(machine())


if __name__ == "__main__":
    main()
