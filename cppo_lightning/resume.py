"""What a run needs, besides weights and optimizer, to go on as if it had never stopped."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

_RECORDED = ("cppo-lightning", "torch", "transformers", "vllm")


def tell_other_versions(saved: Mapping[str, str]) -> None:
    """Warn of packages that are not those a checkpoint was written with: the run may not go on bit by bit."""
    ours = versions()
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            rank_zero_warn(
                f"the checkpoint was written with {name} {saved.get(name, 'not installed')}, this is "
                f"{ours.get(name, 'not installed')}: the run goes on, but perhaps not as it would have"
            )


def versions() -> dict[str, str]:
    """Version by name of the packages whose change may change a run, of those that are installed."""
    found = {}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def generator_states() -> dict[str, Any]:
    """The state of this process's global random generators, as tensors and plain values: Python, numpy, torch, its GPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what :func:`generator_states` gave, possibly on another machine: a GPU's state needs a GPU."""
    python, numbers, gauss = states["python"]
    random.setstate((python, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def checkpoint_path(trainer: Trainer, subcommand: str, path: str) -> str | None:
    """The file to begin with: ``path``, or what ``last`` and the like stand for; None where ``fit`` has no last one yet.

    Raises:
        ConfigError: the name stands for nothing in this run.
    """
    try:
        found = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn(subcommand), path, True, True)
    except ValueError as error:  # Lightning's
        raise ConfigError(
            f"ckpt_path: {path!r} stands for what this process has saved, which is nothing yet; give a file, or last for the "
            "latest in ModelCheckpoint's folder"
        ) from error
    if found is None and subcommand != "fit":  # only training may begin anew: the others would take an untrained model
        raise ConfigError(
            f"ckpt_path: {path!r} stands for the latest in ModelCheckpoint's folder, where there is none; give {subcommand} "
            "the file, such as runs/NAME/version_0/checkpoints/last.ckpt"
        )
    return None if found is None else str(found)


def check_goes_on(path: str, checkpoint: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if ``checkpoint``, which was read from the file ``path``, holds weights alone."""
    if checkpoint and "optimizer_states" not in checkpoint:
        raise ConfigError(
            f"ckpt_path: {path!r} holds weights alone, which can be evaluated and exported; a run that begins with them takes "
            "what export writes as its model.policy.path"
        )


def updates_taken(progress: Any) -> int | None:
    """Minibatches of the running rollout that have been trained on, by Lightning's ``batch_progress``; None once all have."""
    return None if _ended(progress.is_last_batch, vars(progress.current)) else progress.current.processed


def settle_loops(checkpoint: dict[str, Any]) -> None:
    """Rewrite a checkpoint's loop counters to those of a run that stands still between two minibatches, or two rollouts.

    Checkpoints are written from hooks and when a run fails, where Lightning counts a batch or an epoch as begun and not ended.
    Lightning 2.6 goes on rightly from some of these states only: after a checkpoint at a rollout's last minibatch, or with
    ``max_steps``, it would count an epoch twice or train on one batch too many.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batch = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    ended = _ended(batch["is_last_batch"], batch["current"])
    trained = 0 if ended else batch["current"]["processed"]
    begun = epoch["started"] > epoch["processed"]
    rollouts = epoch["processed"]
    if ended and begun:
        rollouts += 1  # the hooks after its last minibatch were running
    elif trained and not begun:
        rollouts -= 1  # max_steps or a signal cut it short, which Lightning calls its end
    counts = {"ready": rollouts + bool(trained), "started": rollouts + bool(trained)}
    for scope in ("current", "total"):
        loop["epoch_progress"][scope] = {**counts, "processed": rollouts, "completed": rollouts}
    total = batch["total"]["processed"]
    batch["is_last_batch"] = False
    for scope, count in (("current", trained), ("total", total)):
        batch[scope] = dict.fromkeys(("ready", "started", "processed", "completed"), count)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = total


def check_same_model(held: Mapping[str, torch.Size], weights: Mapping[str, Tensor], needed: Collection[str]) -> None:
    """Compare the shapes of a checkpoint's weights by name with this run's ``weights``.

    Raises:
        ConfigError: the checkpoint lacks one that is ``needed``, or has one that this model has not, or not in that shape.
    """
    if missing := sorted(set(needed) - held.keys()):
        raise ConfigError(f"ckpt_path: the checkpoint lacks {len(missing)} weights of this run's model, {missing[0]} for one")
    if surplus := sorted(held.keys() - weights.keys()):
        raise ConfigError(f"ckpt_path: the checkpoint is of another model: it has {surplus[0]}, which this one has not")
    if other := sorted(name for name in held if held[name] != weights[name].shape):
        shapes = list(held[other[0]]), list(weights[other[0]].shape)
        raise ConfigError(f"ckpt_path: the checkpoint is of another model: {other[0]} is {shapes[0]}, here {shapes[1]}")


def _ended(is_last_batch: bool, current: Mapping[str, int]) -> bool:
    return is_last_batch and current["processed"] == current["ready"]
