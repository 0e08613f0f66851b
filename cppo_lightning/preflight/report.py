"""The sections of the preflight, from a trainer, a module and a datamodule that have not run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from cppo_lightning.engines import VLLMServerEngine
from cppo_lightning.preflight.batches import Batches
from cppo_lightning.preflight.engine_memory import Load, engine_parts
from cppo_lightning.preflight.example import example_section
from cppo_lightning.preflight.machine import Machine
from cppo_lightning.preflight.memory import Layout, memory_section, training_parts
from cppo_lightning.preflight.model_shape import ModelShape
from cppo_lightning.preflight.section import plural
from cppo_lightning.preflight.settings import trust_region_section
from cppo_lightning.preflight.versions import Setup, cores, installed, versions_section
from cppo_lightning.ranks import data_share, sampling_share
from cppo_lightning.rollout import PromptOrder
from cppo_lightning.strategies import FSDP2

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cppo_lightning.datamodule import RolloutDataModule
    from cppo_lightning.module import RLVRModule
    from cppo_lightning.preflight.section import Section


def preflight(trainer: Trainer, module: RLVRModule, data: RolloutDataModule) -> None:
    """Do what ``trainer.fit`` does before it loads a model, and print on rank 0 what the run would come to.

    It runs in this process alone, however many ranks there would be, and writes no file.  No weights are loaded, no engine is
    started; problems are read, and judged by the run's own verifiers.

    Raises:
        ConfigError: whatever the run would refuse.
    """
    if not trainer.is_global_zero:
        return
    set_up(trainer, module, data)
    console = Console(emoji=False)
    found = sections(trainer, module, data)
    for section in found:
        section.print(console)
    warnings = [warning for section in found for warning in section.warnings]
    for warning in warnings:
        console.print(f"look at this: {warning}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"dry run: nothing was trained; {plural(len(warnings), 'warning')}", highlight=False)


def set_up(trainer: Trainer, module: RLVRModule, data: RolloutDataModule) -> None:
    """The hooks that run before a model is loaded, in Lightning's order; loggers, which would open files, are left out."""
    trainer.loggers = []
    trainer.state.fn = TrainerFn.FITTING
    trainer.strategy.connect(module)
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = data.trainer = trainer
    data.setup("fit")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.setup(trainer, module, "fit")
    module.setup("fit")


def sections(trainer: Trainer, module: RLVRModule, data: RolloutDataModule) -> list[Section]:
    """Everything that is printed, of a run that has been set up."""
    training = data.sets.training
    assert training is not None, "set_up reads it"
    _, ranks = sampling_share(trainer)
    batches = Batches(
        plan=data.plan,
        ranks=data_share(trainer)[1],
        prompt_tokens=training.prompt_tokens,
        max_tokens=data.sampling.max_tokens,
        micro_batch_tokens=module.micro_batch_tokens,
        context=data.sets.context,
        rollouts=_unless_endless(trainer.max_epochs),
        steps=_unless_endless(trainer.max_steps),
    )
    layout, machine = layout_of(trainer, module), Machine.here(trainer.strategy.root_device)
    shape = ModelShape.of(module.policy_config, _held_in(trainer))
    base = ModelShape.of(replace(module.policy_config, lora=None), _held_in(trainer))  # what engine and reference hold
    reference = None if module.reference_kl is None else base.all_frozen()
    load = Load(batches.responses // ranks, batches.longest)
    parts = [
        *training_parts(shape, layout, module.make_optimizer, batches.micro_batch, reference),
        *engine_parts(data.engine, base, load, machine),
    ]
    ranks_here = max(1, ranks // trainer.num_nodes)
    first = PromptOrder(training.problems, data.seed, data.prompts.shares()).take(1)[0]
    return [
        batches.section(),
        memory_section(parts, machine, ranks_here, ahead=data.plan.max_staleness > 0),
        versions_section(_setup(module, data, layout, machine, ranks_here)),
        trust_region_section(module.trust_region),
        example_section(data.sampler, first),
    ]


def layout_of(trainer: Trainer, module: RLVRModule) -> Layout:
    """How the trainer's strategy and precision have a rank hold weights and compute.

    Raises:
        ConfigError: FSDP2's replicas do not divide the ranks.
    """
    strategy = trainer.strategy
    half = str(trainer.precision).startswith("bf16")
    return Layout(
        shards=strategy.shards if isinstance(strategy, FSDP2) else 1,
        copies_gradients=isinstance(strategy, DDPStrategy),
        offloads=isinstance(strategy, FSDP2) and strategy.cpu_offload,
        compute=torch.bfloat16 if half else getattr(torch, module.policy_config.dtype),
        on_cpu=strategy.root_device.type == "cpu",
        checkpointing=module.policy_config.gradient_checkpointing,
    )


def _setup(module: RLVRModule, data: RolloutDataModule, layout: Layout, machine: Machine, ranks_here: int) -> Setup:
    engine: Any = data.engine
    return Setup(
        versions=installed(),
        cuda=torch.version.cuda is not None,
        on_cpu=machine.device is None,
        ranks_here=ranks_here,
        threads=torch.get_num_threads(),
        cores=cores(),
        engine_dtype=getattr(engine, "dtype", None),
        compute=str(layout.compute).removeprefix("torch."),
        budget=getattr(module.trust_region, "delta_b", None),
        servers_elsewhere=isinstance(engine, VLLMServerEngine) and engine.urls is not None,
    )


def _held_in(trainer: Trainer) -> torch.dtype | None:
    """The dtype that the trainer gives every parameter, whatever the policy's is."""
    return torch.bfloat16 if trainer.precision == "bf16-true" else None


def _unless_endless(count: int | None) -> int | None:
    return None if count is None or count < 0 else count
