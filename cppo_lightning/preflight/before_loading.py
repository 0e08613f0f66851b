"""What would show only with the weights loaded, or with the first rollout trained on, and can be seen without."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cppo_lightning.errors import ConfigError
from cppo_lightning.preflight.model_shape import without_weights

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cppo_lightning.module import RLVRModule

# what constructors of optimizers and schedules raise for a number that they cannot use
_REFUSALS = (ArithmeticError, RuntimeError, TypeError, ValueError)


def check_before_loading(trainer: Trainer, module: RLVRModule, trains: bool) -> None:
    """Go through what ``trainer`` and ``module`` will do first, as far as it takes no weights.

    Random generators are left as they are.

    Args:
        trains: whether the run will; else its optimizer is never made.

    Raises:
        ConfigError: a model that cannot be made or read, an optimizer or schedule that cannot be made, or a folder to write to
            that is none.
    """
    check_accumulation(trainer)
    check_folders(trainer)
    path = module.policy_config.path
    check_weight_files(path)
    check_tokenizer(path)
    with torch.random.fork_rng(devices=[]):
        policy = without_weights(module.policy_config)
    if trains:
        sizes = {p.dim() for p in policy.parameters() if p.requires_grad}
        check_optimizer(module.make_optimizer, module.make_lr_scheduler, sizes)


def check_accumulation(trainer: Trainer) -> None:
    """Raise :class:`ConfigError` for what Lightning does of itself where a module does not step its optimizer."""
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches must be 1, got {trainer.accumulate_grad_batches}: a step's gradient is summed "
            "over micro-batches of model.micro_batch_tokens; for larger steps raise data.plan.prompts"
        )
    if trainer.gradient_clip_val:
        raise ConfigError(f"trainer.gradient_clip_val = {trainer.gradient_clip_val} is model.max_grad_norm here; set that")


def check_folders(trainer: Trainer) -> None:
    """Raise :class:`ConfigError` if logs or checkpoints have nowhere to go."""
    for key, place in _folders(trainer):
        if place is None or "://" in str(place):
            continue
        folder = Path(place).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"{key} {str(place)!r} should be a folder, which is made if need be, but {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"{key} {str(place)!r} should be a folder to write to, but this user may not write to {there}")


def _folders(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for logger in trainer.loggers:
        yield "trainer.logger: save_dir", logger.save_dir
    for callback in trainer.checkpoint_callbacks:
        yield f"{type(callback).__name__}.dirpath", getattr(callback, "dirpath", None)
    if trainer.checkpoint_callbacks and not trainer.loggers:
        yield "trainer.default_root_dir", trainer.default_root_dir


def check_weight_files(path: str) -> None:
    """Raise :class:`ConfigError` if the model folder ``path`` lacks weights, or holds safetensors that are not whole.

    Of each file its header is read.  Hub ids are left to the hub.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not folder.is_dir():
        return
    files = [single] if single.is_file() else []
    if not files and index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"model.policy.path {path!r}: {index.name} should say which file holds what: {error!r}"
            ) from error
    if not files and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"model.policy.path {path!r} has no weights; a folder saved by save_pretrained has a model.safetensors, or several "
            f"and a {index.name}"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"model.policy.path {path!r}: {file.name} is missing or not whole ({error}); download or save the model again"
            ) from error


def check_tokenizer(path: str) -> None:
    """Raise :class:`ConfigError` if the model folder or hub id ``path`` has no tokenizer, or one without a vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.policy.path {path!r} has no tokenizer that can be read: {_line(error)}") from error
    if not tokenizer.encode("1 + 1", add_special_tokens=False):  # transformers makes an empty one where files are missing
        raise ConfigError(
            f"model.policy.path {path!r} has no tokenizer: it has no token for any text; save one there with save_pretrained"
        )


def check_optimizer(make: Callable[..., Any], make_schedule: Callable[..., Any] | None, sizes: set[int]) -> None:
    """Make optimizer and schedule of small parameters with these numbers of dimensions, and let the schedule take a step.

    Raises:
        ConfigError: one of them refuses its settings, or parameters like these.
    """
    probes = [nn.Parameter(torch.zeros([2] * dimensions)) for dimensions in sorted(sizes)]
    key = "optimizer"
    try:
        optimizer = make(probes)
        if make_schedule is not None:
            key = "lr_scheduler"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no step was taken before
                make_schedule(optimizer).step()
    except _REFUSALS as error:
        raise ConfigError(f"model.{key} cannot be used as it is set: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
