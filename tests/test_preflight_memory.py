"""The memory that ``fit --dry_run`` estimates, against models, optimizers, caches and a process that really hold it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cppo_lightning.engines import TransformersEngine, VLLMServerEngine
from cppo_lightning.logprobs import Head, token_logprobs
from cppo_lightning.lora import LoRA
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.preflight.engine_memory import Load, engine_parts
from cppo_lightning.preflight.machine import Machine
from cppo_lightning.preflight.memory import Layout, Part, activation_parts, memory_section, optimizer_bytes, peak
from cppo_lightning.preflight.model_shape import ModelShape

AdamW = torch.optim.AdamW


@pytest.mark.parametrize("lora", [None, LoRA(rank=3)])
def test_a_models_shape_is_that_of_the_loaded_model(tiny_model_path: Path, lora: LoRA | None) -> None:
    config = PolicyConfig(str(tiny_model_path), dtype="bfloat16", lora=lora)
    policy, shape = Policy.load(config), ModelShape.of(config)
    for counts, wanted in ((shape.trained, True), (shape.frozen, False)):
        parameters = [p for p in policy.parameters() if p.requires_grad is wanted]
        assert counts.total() == sum(p.numel() for p in parameters)
        assert sum(n * d.itemsize for d, n in counts.items()) == sum(p.nbytes for p in parameters)
    assert shape.parameters == shape.layers * shape.layer + shape.rest
    assert shape.head_is_trained is (lora is None)
    out = policy.model(input_ids=torch.tensor([[5, 6, 7]] * 2), use_cache=True)
    held = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert shape.cache(tokens=6, dtype=torch.bfloat16) == held


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),
    [(AdamW, 8), (lambda p: torch.optim.SGD(p, momentum=0.9), 4), (torch.optim.SGD, 0)],
    ids=["AdamW", "momentum", "SGD"],
)
def test_optimizer_state_is_that_of_the_optimizer(
    tiny_model_path: Path, optimizer: Callable[..., Any], per_parameter: int
) -> None:
    config = PolicyConfig(str(tiny_model_path))
    policy = Policy.load(config)
    made = optimizer(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = sum(t.nbytes for state in made.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
    estimated, _ = optimizer_bytes(ModelShape.of(config).trained, optimizer)
    assert estimated == held == per_parameter * sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("mixed", [False, True])
def test_activations_are_about_those_that_autograd_keeps(tiny_model_path: Path, mixed: bool) -> None:
    """Within a quarter, what layers keep for the backward pass of 2 x 256 tokens, without weights and their casts."""
    config = PolicyConfig(str(tiny_model_path))
    model, tokens = Policy.load(config).model, 512
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % tokens == 0 and tensor.shape[0] in (2, tokens):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = (storage, storage.nbytes())  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model.base_model(input_ids=torch.full((2, 256), 7), use_cache=False)
    shape, layout = ModelShape.of(config), Layout(compute=torch.bfloat16 if mixed else torch.float32)
    estimated = activation_parts(shape, layout, tokens)[0].bytes * shape.layers / (shape.layers + 1)
    assert 0.75 < sum(size for _, size in kept.values()) / estimated < 1.25


@pytest.mark.parametrize(("tokens", "vocabulary"), [(2000, 3000), (10000, 400), (3, 100)])
def test_logits_are_as_many_as_are_computed_at_once(
    tokens: int, vocabulary: int, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of the vocabulary that is smaller on a CPU, one that is as narrow as it may be, and one that is all of it."""
    sizes, logits = [], Head.logits

    def spy(head: Head, *arguments: Any) -> torch.Tensor:
        sizes.append((made := logits(head, *arguments)).nbytes)
        return made

    monkeypatch.setattr(Head, "logits", spy)
    token_logprobs(torch.zeros(tokens, 8), Head(torch.zeros(vocabulary, 8)), torch.zeros(tokens, dtype=torch.long))
    shape = replace(ModelShape.of(PolicyConfig(str(tiny_model_path))), hidden=8, vocabulary=vocabulary)
    here, there = (activation_parts(shape, Layout(on_cpu=on_cpu), tokens)[1].bytes for on_cpu in (True, False))
    assert here == 3 * max(sizes)
    assert there == 3 * 4 * tokens * vocabulary


MEASURE = """
import re, sys, torch
from pathlib import Path
from cppo_lightning.batch import RolloutBatch
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.preflight.machine import Machine
from cppo_lightning.preflight.memory import Layout, peak, training_parts
from cppo_lightning.preflight.model_shape import ModelShape

config, rows = PolicyConfig(sys.argv[1]), 2
estimated = peak(training_parts(ModelShape.of(config), Layout(), torch.optim.AdamW, rows * 128, None), False)
before = Machine.here(torch.device("cpu")).process
policy = Policy.load(config)
optimizer = torch.optim.AdamW(policy.parameters())
ids, floats, numbers = torch.full((rows, 64), 7), torch.zeros(rows, 64), torch.zeros(rows, dtype=torch.long)
batch = RolloutBatch(ids, ids > 0, ids, ids > 0, floats, floats[:, 0], floats[:, 0], numbers, numbers)
for _ in range(2):  # the state of AdamW comes with its first step
    policy(batch, 1.0).logp.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
# not getrusage's, which begins with that of the process that started this one
highest = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print((highest - before) / estimated)
"""


@pytest.mark.slow
def test_a_process_grows_by_what_was_estimated(smollm2_path: Path) -> None:
    """SmolLM2 in float32 with gradients and AdamW: within a quarter of the estimate."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(smollm2_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout.split()[-1]) < 1.25


def test_training_and_sampling_take_turns_unless_a_rollout_is_drawn_ahead() -> None:
    parts = [Part("weights", 10, ""), Part("gradients", 5, "", "training"), Part("cache", 3, "", "sampling")]
    assert peak(parts, ahead=False) == 15
    assert peak(parts, ahead=True) == 18


def test_memory_that_is_not_there_is_told() -> None:
    parts = [Part("weights", 10, ""), Part("offloaded", 6, "", on_host=True)]
    told = {
        Machine(device=None, host=40, process=4): 0,  # 2 ranks x 20
        Machine(device=None, host=39, process=4): 1,
        Machine(device=10, host=20, process=4): 0,
        Machine(device=9, host=19, process=4): 2,
    }
    for machine, warnings in told.items():
        assert len(memory_section(parts, machine, ranks_here=2, ahead=False).warnings) == warnings


def test_an_engines_share(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, machine = ModelShape.of(PolicyConfig(str(tiny_model_path))), Machine(device=80, host=100, process=1)
    weights, cache, _ = engine_parts(TransformersEngine("bfloat16", max_sequences=4), shape, Load(32, 10), machine)
    assert weights.bytes == 2 * shape.parameters
    assert cache.bytes == 1.5 * shape.cache(4 * 10, torch.bfloat16)
    assert not weights.on_host
    monkeypatch.setenv("CPPO_VLLM_API_KEY", "key")
    elsewhere = VLLMServerEngine(urls=["http://10.0.0.7:8000"], weights_folder="/shared")
    assert [part.bytes for part in engine_parts(elsewhere, shape, Load(32, 10), machine)] == [0]
