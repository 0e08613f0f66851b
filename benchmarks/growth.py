"""Time and memory as responses become longer, in a training step, and more, in a rollout.

    python benchmarks/growth.py --model models/SmolLM2-135M-Instruct
    python benchmarks/growth.py --vllm

A step is ``RLVRModule.training_step`` on one response under CPPO, with AdamW; a rollout is ``generate`` of an engine.  A size's
exponent is that of the last doubling; the last line's are fitted over the upper half of the sizes.  Beside a step's exponent of
time stands that of its floating-point operations, of which attention's grow with the square of the tokens.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from measure import exponent, free_memory, machine, peak_extra_memory, seconds
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.rollout import RolloutEngine, Sampling, TransformersEngine, VLLMEngine
from cppo_lightning.trust_regions import CPPO

MIB = 2**20
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as Lightning's and the engines' auto
PROMPT = 32
ROLLOUTS = (
    "Rollouts: below engine.max_sequences a step reads all weights for few rows, so time grows less than the sequences; above, "
    "the embedded engine takes them in turn: time grows with the sequences and memory with the answers alone."
)
Figures = tuple[float, float]  # seconds, bytes


def doublings(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length()) if first << i <= last]


def small_model(folder: str, positions: int) -> str:
    """A random Llama of 4 layers, 256 wide, with 32,768 tokens."""
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2**15, max_position_embeddings=positions, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Measured(RLVRModule):
    """Notes each step's seconds and most memory."""

    def __init__(self, path: str) -> None:
        super().__init__(PolicyConfig(path), CPPO())
        self.figures: list[Figures] = []

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        step = partial(super().training_step, batch, batch_idx)
        with peak_extra_memory(HERE) as peak:
            taken = seconds(step, HERE)
        self.figures.append((taken, peak.bytes))


def response(tokens: int, vocabulary: int, top_k: int) -> RolloutBatch:
    """One random response, whose log-probabilities are those of a uniform policy."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROMPT + tokens), generator=generator)
    logp = torch.full((1, tokens, top_k), -math.log(vocabulary))
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    return RolloutBatch(
        prompt_ids=ids[:, :PROMPT],
        prompt_mask=torch.ones(1, PROMPT, dtype=torch.bool),
        response_ids=ids[:, PROMPT:],
        response_mask=torch.ones(1, tokens, dtype=torch.bool),
        rollout_logp=logp[..., 0],
        advantages=one,
        rewards=one,
        group=zero,
        policy_version=zero,
        topk_ids=torch.arange(top_k).expand(1, tokens, top_k),
        topk_rollout_logp=logp,
    )


def steps(module: Measured, tokens: int, rounds: int) -> Figures:
    """Least seconds of a step, and the most memory of one, after a short one that makes the optimizer's state."""
    module.configure_model()
    assert module.policy is not None
    vocabulary = module.policy.model.config.vocab_size
    batches = [response(length, vocabulary, module.trust_region.top_k) for length in (64, *[tokens] * rounds)]
    module.figures.clear()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_epochs=1, devices=1, **dict.fromkeys(quiet, False))  # pyright: ignore[reportArgumentType]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    times, peaks = zip(*module.figures[1:], strict=True)
    return min(times), max(peaks)


def operations(policy: Policy, tokens: int) -> tuple[float, float]:
    """Floating-point operations of a step, of matrix products and of attention.

    Backward is twice forward, and makes the scores of the head and of attention again.
    """
    work, length = policy.work, PROMPT + tokens
    assert work is not None  # of a model of policy.PLAIN_CAUSAL
    head = policy.model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    # causal attention skips half of the pairs
    return length * (3 * work.per_token + 2 * head.numel()), 3.5 * length**2 / 2 * work.per_pair


def rollout(engine: RolloutEngine, sequences: int, tokens: int, rounds: int) -> Figures:
    """Least seconds of ``sequences`` samples, eight to a prompt, and the most memory of one rollout."""
    prompts = [list(range(1000 + PROMPT * i, 1000 + PROMPT * (i + 1))) for i in range(sequences // 8)]
    # hot, so that hardly any sample ends before its limit
    call = partial(engine.generate, prompts, 8, Sampling(tokens, temperature=2.0), 20)
    with peak_extra_memory(HERE) as peak:
        first = seconds(call, HERE)
    return min([first, *(seconds(call, HERE) for _ in range(rounds - 1))]), peak.bytes


def grown(sizes: Iterable[int], measure: Callable[[int], Figures], limit: float) -> Iterator[tuple[int, Figures]]:
    """Figures by size, until the next may take more than ``limit`` seconds, growing with the square, or the free memory."""
    for size in sizes:
        figures = measure(size)
        yield size, figures
        if 4 * figures[0] > limit or 2 * figures[1] > free_memory(HERE):
            return


def table(title: str, unit: str, found: Sequence[tuple[int, Figures]], work: Callable[[int], float] | None = None) -> Table:
    """A line per size, and one of exponents fitted over the upper half of the sizes; ``work`` gives operations."""
    head = ("seconds", "exponent", *(["of operations"] if work else []), "extra MiB", "exponent")
    shown = Table(unit, *head, title=title, box=MARKDOWN)

    def line(name: str, part: Sequence[tuple[int, Figures]], taken: str, held: str) -> None:
        sizes = [size for size, _ in part]
        series = [[of[0] for _, of in part], [work(size) for size in sizes] if work else None, [of[1] for _, of in part]]
        time, operations, memory = ("" if of is None or len(part) < 2 else f"{exponent(sizes, of):.2f}" for of in series)
        shown.add_row(name, taken, time, *([operations] if work else []), held, memory)

    for i, (size, (taken, held)) in enumerate(found):
        line(f"{size:,}", found[max(0, i - 1) : i + 1], f"{taken:.2f}", f"{held / MIB:.0f}")
    upper = found[len(found) // 2 :]
    line("fitted", upper, "", "")
    return shown


def step_table(title: str, path: str, sizes: Iterable[int], limit: float) -> tuple[Table, str]:
    """Of steps with the model in ``path``, and a sentence on them."""
    module = Measured(path)
    shown = track(sizes, title)
    found = list(grown(shown, lambda tokens: steps(module, tokens, 3 if tokens <= 1024 else 1), limit))
    assert module.policy is not None
    policy, longest = module.policy, found[-1][0]
    products, attention = operations(policy, longest)
    note = (
        f"{title}: attention is {attention / (products + attention):.0%} of {(products + attention) / 1e12:.1f} TFLOP at "
        f"{longest:,} tokens; matrix products, masks and activations grow with the tokens, gradients not at all."
    )
    return table(title, "response tokens", found, lambda tokens: sum(operations(policy, tokens))), note


def rollout_table(title: str, engine: RolloutEngine, options: argparse.Namespace) -> Table:
    engine.start(options.model)
    rollout(engine, 8, 4, 1)  # warms up
    shown = track(doublings(8, options.sequences), title)
    found = [(n, rollout(engine, n, options.tokens, 3 if n <= 64 else 1)) for n in shown]
    engine.close()
    return table(f"{title}, {options.tokens} tokens each", "sequences", found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory as responses become longer and more.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--longest", type=int, default=2**14, help="response tokens of a step")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a step; a longer one is not begun")
    parser.add_argument("--sequences", type=int, default=512, help="of a rollout")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer in a rollout")
    parser.add_argument("--vllm", action="store_true", help="rollouts of vLLM as well")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for told in (".*does not have many workers.*", ".*no `val_dataloader`.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", told)

    sizes = doublings(512, options.longest)
    with tempfile.TemporaryDirectory() as folder:
        small = small_model(folder, PROMPT + options.longest)
        made = [step_table("a step, 4 layers, 256 wide", small, sizes, options.limit)]
    made.append(step_table(f"a step, {Path(options.model).name}", options.model, sizes, options.limit))
    tables, notes = map(list, zip(*made, strict=True))
    engines: dict[str, RolloutEngine] = {"embedded": TransformersEngine()}
    if options.vllm:
        engines["vLLM"] = VLLMEngine()
    tables += [rollout_table(f"a rollout, {name}", engine, options) for name, engine in engines.items()]
    console = Console(width=120)
    for shown in tables:
        console.print(shown)
    console.print(*notes, ROLLOUTS, machine(HERE), sep="\n")


if __name__ == "__main__":
    main()
