"""What a rank's engine needs in memory to sample the run's rollouts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING

import torch

from cppo_lightning.engines import RolloutEngine, TransformersEngine, VLLMEngine, VLLMServerEngine
from cppo_lightning.preflight.memory import Part
from cppo_lightning.preflight.section import number

if TYPE_CHECKING:
    from cppo_lightning.preflight.machine import Machine
    from cppo_lightning.preflight.model_shape import ModelShape


@dataclass(frozen=True)
class Load:
    """What one rank has sampled at a time: ``responses`` of ``tokens`` tokens each, prompt included, at the longest."""

    responses: int
    tokens: int


@singledispatch
def engine_parts(engine: RolloutEngine, shape: ModelShape, load: Load, machine: Machine) -> list[Part]:
    """The engine's weights and cache; one part without a size for an engine that is not known here."""
    return [Part("engine", 0, f"{type(engine).__name__} is not known here", "sampling")]


@engine_parts.register(TransformersEngine)
def _(engine: TransformersEngine, shape: ModelShape, load: Load, machine: Machine) -> list[Part]:
    dtype: torch.dtype = getattr(torch, engine.dtype)
    rows, on_host = min(engine.max_sequences, load.responses), engine.device == "cpu"
    cache, logits = shape.cache(rows * load.tokens, dtype), 3 * 4 * rows * shape.vocabulary
    note = f"{rows} responses of {number(load.tokens)} tokens, prompt included"
    return [
        Part("engine's weights", shape.parameters * dtype.itemsize, f"a copy in {engine.dtype}", on_host=on_host),
        # keys and values are copied where the cache grows
        Part("engine's cache", 1.5 * cache, f"{note}, and half as much where it grows", "sampling", on_host),
        Part("engine's logits", logits, f"{rows} x {number(shape.vocabulary)} float32, three times", "sampling", on_host),
    ]


@engine_parts.register(VLLMEngine)
def _(engine: VLLMEngine, shape: ModelShape, load: Load, machine: Machine) -> list[Part]:
    dtype: torch.dtype = getattr(torch, engine.dtype)
    weights = shape.parameters * dtype.itemsize
    if machine.device is not None:
        share = engine.gpu_memory_utilization
        lent = Part(
            "engine", share * machine.device, f"gpu_memory_utilization {share:g}", "sampling" if engine.sleep else "always"
        )
        return [lent, Part("engine's weights, asleep", weights * engine.sleep, "while the trainer has the GPU", on_host=True)]
    gibibytes = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"))
    return [
        Part("engine's weights", weights, f"a copy in {engine.dtype}; what the CPU's kernels pack is not counted"),
        Part("engine's cache", gibibytes * 2**30, "VLLM_CPU_KVCACHE_SPACE"),
    ]


@engine_parts.register(VLLMServerEngine)
def _(engine: VLLMServerEngine, shape: ModelShape, load: Load, machine: Machine) -> list[Part]:
    where = "on other machines" if engine.urls is not None else f"{engine.servers} on this one, which share its memory"
    return [Part("engine", 0, f"servers are processes of their own, {where}", "sampling")]
