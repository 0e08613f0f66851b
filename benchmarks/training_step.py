"""One optimizer step of ``RLVRModule`` on a Trainer of its own: tokens per second, share of the peak, memory, where time goes.

    python benchmarks/training_step.py --shape smollm2-135m --tokens 512
    python benchmarks/training_step.py --shape qwen3-1.7b --tokens 8192 --responses 8     # on CUDA, in bf16

Weights are random, in the shape that ``--shape`` or a folder's ``config.json`` says; responses are random tokens of one length,
each behind a prompt of its own, judged by CPPO on the top 20.  Model FLOPs are ``6 N`` per token read (N: parameters of the
layers), three times attention's causal half and, per response token, three times the head's; what is computed twice counts
once.  Steps with clocks, at each of which a GPU's queue is emptied, take turns with steps without.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from measure import in_turns, machine, ratio, seconds
from rich.console import Console
from rich.table import Table
from step_clock import Clock
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.module import RLVRModule
from cppo_lightning.onednn import product
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.trust_regions import CPPO

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    "qwen3-1.7b": Qwen3Config(
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151936, "head_dim": 128},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960, "tie_word_embeddings": True},
    ),
}
# dense bf16 operations per second, of the makers' data sheets, by a part of the device's name; the first that fits counts
BF16_PEAKS = {
    **{"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12},
    **{"A10G": 70e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}
PROMPT, TOP_K = 128, 20


class RandomWeights(RLVRModule):
    """Has the model's shape, and needs no file of weights."""

    def configure_model(self) -> None:
        if self.policy is None:
            with self.trainer.strategy.root_device:
                model = AutoModelForCausalLM.from_config(trust_remote_code=False, **self.policy_config.arguments())
            self.policy = Policy._with(model, self.policy_config)


class Minibatch(Dataset[RolloutBatch]):
    """One minibatch a rollout, as if the policy's present weights had sampled it."""

    def __init__(self, trainer: Trainer, responses: int, tokens: int, vocabulary: int) -> None:
        self.trainer, self.shape, self.vocabulary = trainer, (responses, tokens), vocabulary

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> RolloutBatch:
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        rows, uniform = self.shape[0], -torch.tensor(float(self.vocabulary)).log()

        def ids(*shape: int) -> torch.Tensor:
            return torch.randint(self.vocabulary, shape, generator=generator)

        return RolloutBatch(
            prompt_ids=ids(rows, PROMPT),
            prompt_mask=torch.ones(rows, PROMPT, dtype=torch.bool),
            response_ids=ids(*self.shape),
            response_mask=torch.ones(self.shape, dtype=torch.bool),
            rollout_logp=uniform.expand(self.shape).clone(),
            advantages=torch.randn(rows, generator=generator),
            rewards=torch.zeros(rows),
            group=torch.arange(rows),
            policy_version=torch.full((rows,), self.trainer.global_step),
            topk_ids=ids(*self.shape, TOP_K),
            topk_rollout_logp=uniform.expand(*self.shape, TOP_K).clone(),
        )


def model_flops(config: PreTrainedConfig, policy: Policy, responses: int, tokens: int) -> float:
    """Of one step, forward and backward."""
    model: Any = policy.model
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    layers = sum(p.numel() for p in policy.parameters() if p not in ends)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = PROMPT + tokens
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_size * length**2 / 2
    return 3 * responses * (2 * layers * length + attention + 2 * config.vocab_size * config.hidden_size * tokens)


def peak(device: torch.device, given: float | None) -> tuple[float, str] | None:
    """Operations per second that the device can do, and where the number is from; None for an unknown GPU."""
    if given is not None:
        return given * 1e12, "given"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next(((value, f"{part}'s data sheet, bf16") for part, value in BF16_PEAKS.items() if part in name), None)
    a, b, n = torch.randn(2048, 2048), torch.randn(2048, 2048), 2048
    return 2 * n**3 / min(seconds(lambda: product(a, b)) for _ in range(10)), "fastest of 20 float32 products of 2048 x 2048"


def optimizer_seconds(policy: Policy, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Of AdamW on the policy's parameters, in one kernel and in one per operation."""
    parameters = list(policy.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    calls = {
        "fused": torch.optim.AdamW(parameters, lr=1e-6, fused=True).step,
        "foreach": torch.optim.AdamW(parameters, lr=1e-6, foreach=True).step,
    }
    in_turns(calls, range(2), device)  # the first step makes the states
    return in_turns(calls, range(rounds), device)


def main() -> None:
    parser = argparse.ArgumentParser(description="One optimizer step: how fast, how close to the peak, and where time goes.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    what.add_argument("--model", help="a model's folder, of which config.json is read")
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument("--responses", type=int, default=4, help="in one step")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--precision", help="the Trainer's; bf16-mixed on a GPU and 32-true on a CPU if it is not said")
    parser.add_argument("--peak", type=float, help="10^12 operations per second of the device, where its name is not known")
    parser.add_argument("--without-onednn", action="store_true", help="torch's own matrix products on a CPU")
    parser.add_argument("--rounds", type=int, default=3, help="of a step without clocks and one with them")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="lightning")
    torch.backends.mkldnn.set_flags(not options.without_onednn)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if (best := peak(device, options.peak)) is None:
        parser.error(f"the peak of {torch.cuda.get_device_name(device)} is not known here; give it by --peak")
    clock = Clock(warm_up=2)
    trainer = Trainer(
        **{"accelerator": "cuda" if on_gpu else "cpu", "devices": 1, "max_epochs": clock.warm_up + 2 * options.rounds},
        precision=options.precision or ("bf16-mixed" if on_gpu else "32-true"),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        callbacks=[clock],
    )
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(options.model) if options.model else SHAPES[options.shape]
        config.save_pretrained(folder)
        policy_config = PolicyConfig(folder, gradient_checkpointing=options.gradient_checkpointing)
        module = RandomWeights(policy_config, CPPO(), micro_batch_tokens=options.micro_batch_tokens)
        rollouts = Minibatch(trainer, options.responses, options.tokens, config.vocab_size)
        trainer.fit(module, DataLoader(rollouts, batch_size=None))
    best = max(best, peak(device, options.peak) or best)  # of a CPU that others use too, it may have been a bad moment
    report(options, trainer, module, clock, best)


def report(options: Any, trainer: Trainer, module: RLVRModule, clock: Clock, best: tuple[float, str]) -> None:
    policy, device = module.policy, trainer.strategy.root_device
    assert policy is not None
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    step, trained = statistics.median(clock.whole), options.responses * options.tokens
    flops = model_flops(policy.model.config, policy, options.responses, options.tokens)
    parameters = sum(p.numel() for p in policy.parameters())
    shape = (
        f"{options.model or options.shape}, {parameters / 1e6:,.0f}M parameters, {options.responses} x {options.tokens} tokens"
    )
    console = Console()
    table = Table(title=f"{machine(device)}\n{shape}, micro-batches: {clock.micro_batches}, {trainer.precision}")
    table.add_column("one step")
    table.add_column("", justify="right")
    table.add_row("seconds", f"{step:.3f}")
    table.add_row("response tokens per second", f"{trained / step:,.0f}")
    table.add_row("model FLOPs", f"{flops:.3g}")
    table.add_row(f"utilisation of {best[0] / 1e12:.3g} TFLOP/s ({best[1]})", f"{flops / step / best[0]:.1%}")
    table.add_row("peak memory, GiB" + ("" if device.type == "cuda" else " (resident)"), f"{held / 2**30:.1f}")
    console.print(table)

    phases = {name: statistics.median(each.get(name, 0.0) for each in clock.phases) for name in clock.phases[0]}
    total = statistics.median(sum(each.values()) for each in clock.phases)
    table = Table()
    for name in ("phase", "seconds", "share"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, spent in sorted(phases.items(), key=lambda item: (item[0] == "the rest", -item[1])):
        table.add_row(name, f"{spent:.4f}", f"{spent / total:.1%}")
    table.add_row("a step with clocks; without = 1", f"{total:.4f}", f"{total / step:.2f}")
    console.print(table)

    trainer.strategy.optimizers = []  # its states are no more needed
    taken = optimizer_seconds(policy, device, max(5, options.rounds))
    table = Table(title="AdamW on these parameters")
    for name in ("", "milliseconds", "fused = 1"):
        table.add_column(name, justify="right" if name else "left")
    for kind, rounds in taken.items():
        table.add_row(kind, f"{statistics.median(rounds) * 1e3:.1f}", f"{ratio(rounds, taken['fused']):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
