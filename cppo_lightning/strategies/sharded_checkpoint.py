"""Checkpoints of sharded runs: a folder of safetensors files with the shards, and ``meta.pt`` with everything else.

No file is unpickled but ``meta.pt``, which is read as tensors and plain values.  Shards carry their place in the whole tensor,
so that any number of ranks can read what another number wrote.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from cppo_lightning.errors import ConfigError
from cppo_lightning.ranks import from_rank_zero
from cppo_lightning.untrusted import META, UNFINISHED, names_to_disk, write_whole

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_FILE_BYTES = 2**30  # a file is put together in memory before it is written


def save(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write ``checkpoint`` into ``folder`` under another name, which it is given when all ranks are done.

    What has the name before stays until then, and a run that is killed meanwhile leaves it.

    Raises:
        Exception: on every rank, if one cannot write.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shards = dict(_shards(checkpoint))

    def begin() -> None:
        for left in folder.parent.glob(f".*{UNFINISHED}/"):
            shutil.rmtree(left)  # of a run that was killed
        unfinished.mkdir(parents=True)

    def finish() -> None:
        write_whole(_without_shards(checkpoint), unfinished / META)
        put(unfinished, folder)

    from_rank_zero(begin)
    writer = HuggingFaceStorageWriter(str(unfinished), fqn_to_index_mapping=_files(shards), save_distributed=True)
    save_tensors(shards, storage_writer=writer)
    from_rank_zero(finish)


def load(folder: Path, rest: Mapping[str, Any], model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Read the shards in ``folder`` into ``model`` and ``optimizers``, together with what ``rest`` has of these.

    Parameters that are not in the folder have to be frozen, and stay as they are: the reference is one.

    Raises:
        ConfigError: the folder lacks something that is trained, or has weights that the model has no place for.
    """
    reader = HuggingFaceStorageReader(str(folder))
    held = reader.read_metadata().state_dict_metadata.keys()
    trained = {f"state_dict/{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = dict(_shards({"state_dict": get_model_state_dict(model)}))
    states = [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
    wanted |= dict(_shards({"optimizer_states": states}))
    if missing := sorted(name for name in wanted.keys() - held if name in trained or not name.startswith("state_dict/")):
        raise ConfigError(f"ckpt_path: {str(folder)!r} lacks {len(missing)} tensors of this run, {missing[0]} for one")
    if surplus := sorted(name for name in held - wanted.keys() if name.startswith("state_dict/")):
        raise ConfigError(f"ckpt_path: {str(folder)!r} is of another model: it has {surplus[0]}, which this one has not")
    load_tensors({name: tensor for name, tensor in wanted.items() if name in held}, storage_reader=reader)
    model.load_state_dict(rest["state_dict"], strict=False)
    for optimizer, state, plain in zip(optimizers, states, rest["optimizer_states"], strict=True):
        set_optimizer_state_dict(model, optimizer, _joined(plain, state), options=StateDictOptions())


def _shards(tree: Any, path: str = "") -> Iterator[tuple[str, DTensor]]:
    """The sharded tensors in nested mappings and lists, by their path."""
    if isinstance(tree, DTensor):
        yield path, tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _shards(value, f"{path}/{key}" if path else str(key))


def _without_shards(tree: Any) -> Any:
    """The rest of nested mappings and lists, as plain ones."""
    if isinstance(tree, Mapping):
        return {key: _without_shards(value) for key, value in tree.items() if not isinstance(value, DTensor)}
    return [_without_shards(value) for value in tree] if isinstance(tree, list) else tree


def _joined(rest: Any, whole: Any) -> Any:
    """``rest`` with the shards that stand in ``whole``, from which :func:`_without_shards` would have made it."""
    if not isinstance(whole, Mapping):
        return rest
    return {k: v if isinstance(v, DTensor) else _joined(rest[k], v) for k, v in whole.items()}


def _files(shards: Mapping[str, DTensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to, from 1."""
    places, total = {}, 0
    for name, tensor in shards.items():
        local = tensor.to_local()
        places[name], total = 1 + total // _FILE_BYTES, total + local.numel() * local.element_size()
    return places


def put(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place`` in one step, also where something has that name, which is then deleted."""
    if os.path.lexists(place):
        _exchange(new, place)
        shutil.rmtree(new) if new.is_dir() and not new.is_symlink() else new.unlink()
    else:
        new.rename(place)
    names_to_disk(place.parent)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names at once (Linux), since folders cannot be renamed over another."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
