"""What a rank needs in memory, from the model's shape and the run's settings: estimates, with what they assume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cppo_lightning.logprobs import slice_width
from cppo_lightning.preflight.model_shape import ModelShape, weight_bytes
from cppo_lightning.preflight.section import Row, Section, number, size

if TYPE_CHECKING:
    from cppo_lightning.preflight.machine import Machine

Phase = Literal["always", "training", "sampling"]
_FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """Bytes of one rank that something takes, and when."""

    name: str
    bytes: float
    note: str
    phase: Phase = "always"
    on_host: bool = False  # in host memory, also where ranks compute on an accelerator


@dataclass(frozen=True)
class Layout:
    """How a rank holds and computes.

    Args:
        shards: ranks that one copy of the weights is spread over.
        copies_gradients: whether gradients are gathered in buckets of their own (DDP).
        offloads: whether shards, gradients and optimizer states lie in host memory.
        compute: dtype of activations.
        on_cpu: whether the rank computes on the CPU.
        checkpointing: whether activations are recomputed layer by layer.
    """

    shards: int = 1
    copies_gradients: bool = False
    offloads: bool = False
    compute: torch.dtype = torch.float32
    on_cpu: bool = True
    checkpointing: bool = False


def training_parts(
    shape: ModelShape, layout: Layout, optimizer: Callable[..., Any], tokens: int, reference: ModelShape | None
) -> list[Part]:
    """What one rank needs to train on micro-batches of ``tokens`` padded tokens; ``reference`` is the frozen model's shape."""
    shards, off = layout.shards, layout.offloads
    each = f", 1/{shards} of it on each rank" if shards > 1 else ""
    trained, frozen = weight_bytes(shape.trained), weight_bytes(shape.frozen)
    masters = ", the float32 masters of what is computed in bf16" if _has_masters(shape, layout) else ""
    state, kind = optimizer_bytes(shape.trained, optimizer)
    parts = [
        Part(
            "policy weights",
            (trained + frozen) / shards,
            f"{number(shape.parameters)} in {_dtypes(shape)}{masters}{each}",
            on_host=off,
        ),
        Part("gradients", trained / shards, f"of {number(shape.trained.total())} trained parameters{each}", "training", off),
        Part("optimizer state", state / shards, f"{kind}{each}", on_host=off),
    ]
    if layout.copies_gradients:
        parts.append(Part("gradient buckets", trained, "DDP's, which ranks average"))
    if reference is not None:
        parts.append(Part("reference weights", weight_bytes(reference.frozen) / shards, f"frozen{each}", on_host=off))
    parts += [_computed_with(shape, layout), *activation_parts(shape, layout, tokens)]
    return [part for part in parts if part.bytes]


def optimizer_bytes(trained: Counter[torch.dtype], optimizer: Callable[..., Any]) -> tuple[float, str]:
    """Bytes of the optimizer's state and what it is, from one step of the run's own optimizer on a small matrix per dtype."""
    total, name, ratios = 0.0, "", []
    for dtype, count in trained.items():
        probe = nn.Parameter(torch.zeros(64, 128, dtype=dtype))
        probe.grad = torch.ones_like(probe)
        made = optimizer([probe])
        made.step()
        held = [value for value in made.state[probe].values() if isinstance(value, torch.Tensor) and value.dim()]
        per_parameter = sum(value.nbytes for value in held) / probe.numel()
        total += per_parameter * count
        name = type(made).__name__
        ratios.append(f"{per_parameter:g} bytes per {_name(dtype)} parameter")
    return total, f"{name}: {', '.join(ratios)}"


def activation_parts(shape: ModelShape, layout: Layout, tokens: int) -> list[Part]:
    """What the backward pass needs of one micro-batch.

    Assumes layers of the Llama kind and an attention that keeps no score matrix (sdpa, flash).  A layer keeps, per token, about
    ``6 hidden + 4 (queries + keys) + 4 intermediate`` numbers in the dtype that it computes in, and where that is not float32
    ``4 hidden`` float32 numbers in its norms.  Of logits only a slice of the vocabulary exists at a time.
    """
    width = layout.compute.itemsize
    per_token = width * (6 * shape.hidden + 4 * (shape.queries + shape.keys) + 4 * shape.intermediate)
    per_token += 4 * _FLOAT32 * shape.hidden if width < _FLOAT32 else 0
    if layout.checkpointing:
        kept = shape.layers * _FLOAT32 * shape.hidden + per_token
        note = f"one layer, recomputed, and the inputs of {shape.layers}"
    else:
        kept, note = (shape.layers + 1) * per_token, f"{shape.layers} layers, and one whose gradient is computed"
    piece = tokens * min(shape.vocabulary, slice_width(tokens, shape.hidden, layout.on_cpu)) * _FLOAT32
    head = shape.vocabulary * shape.hidden * width if shape.head_is_trained else 0
    return [
        Part("activations", tokens * kept, f"{number(tokens)} padded tokens, {note}", "training"),
        Part(
            "logits", 3 * piece, f"3 slices of {size(piece)}; never {number(tokens)} x {number(shape.vocabulary)}", "training"
        ),
        Part("the head's gradient", head, "a micro-batch's, before it is added to the sum", "training"),
    ]


def memory_section(parts: Sequence[Part], machine: Machine, ranks_here: int, ahead: bool) -> Section:
    """The parts, their peak and the memory that there is.

    Args:
        ranks_here: ranks on one machine, whose host memory they share.
        ahead: whether a rollout is drawn while another is trained on.
    """
    process = Part("this process", machine.process, "libraries and data, as they are now", on_host=True)
    everything = [*parts, process]
    rows: list[Row] = [
        (p.name, size(p.bytes) if p.bytes else "not counted", p.note + ("" if p.phase == "always" else f"; while {p.phase}"))
        for p in everything
    ]
    peaks = {"host memory": 0.0}
    if machine.device is None:
        peaks["host memory"] = peak(everything, ahead)
    else:
        peaks["accelerator's memory"] = peak([p for p in everything if not p.on_host], ahead)
        peaks["host memory"] = peak([p for p in everything if p.on_host], ahead)
    warnings = []
    for name, needed in peaks.items():
        ranks, there = (ranks_here, machine.host) if name == "host memory" else (1, machine.device or 0)
        together = f" x {ranks} ranks" if ranks > 1 else ""
        rows.append((f"peak, {name}", size(needed), f"per rank{together}; there is {size(there)}"))
        if needed * ranks > there:
            warnings.append(
                f"estimated peak of {name}: {size(needed)}{together}, and there is {size(there)}; lower "
                "model.micro_batch_tokens, set model.policy.gradient_checkpointing, share the weights among more ranks "
                "(configs/strategy/fsdp2.yaml), or train adapters (model.policy.lora)"
            )
    return Section("Memory of one rank, estimated", rows, warnings)


def peak(parts: Sequence[Part], ahead: bool) -> float:
    """Bytes needed at once: training and sampling take turns unless a rollout is drawn ``ahead``."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums[part.phase] += part.bytes  # type: ignore[assignment]
    together = sum if ahead else max
    return sums["always"] + together((sums["training"], sums["sampling"]))


def _computed_with(shape: ModelShape, layout: Layout) -> Part:
    """Weights as they are computed with, where they are not held like that."""
    if layout.shards > 1 or layout.offloads:
        count, note = shape.rest + 2 * shape.layer, "two layers, embedding and head, whole"
    else:
        count = shape.parameters if _has_masters(shape, layout) else 0
        note = "autocast keeps what it has cast for a micro-batch"
    return Part("gathered or cast weights", count * layout.compute.itemsize, note, "training")


def _has_masters(shape: ModelShape, layout: Layout) -> bool:
    held = min((dtype.itemsize for dtype in (*shape.trained, *shape.frozen)), default=0)
    return layout.compute.itemsize < held


def _dtypes(shape: ModelShape) -> str:
    return " and ".join(sorted({_name(dtype) for dtype in (*shape.trained, *shape.frozen)}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
