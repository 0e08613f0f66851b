"""Checkpoints of sharded runs: a folder of safetensors files with the shards, and ``meta.pt`` with everything else.

No file is unpickled but ``meta.pt``, which is read as tensors and plain values.  Shards carry their place in the whole tensor,
so that any number of ranks can read what another number wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
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
from cppo_lightning.ranks import AllRanksError, from_rank_zero
from cppo_lightning.replacing import put, standing
from cppo_lightning.resume import check_same_model
from cppo_lightning.strategies.sharding import copy_part
from cppo_lightning.untrusted import META, UNFINISHED, WeightsOnly, write_whole

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

T = TypeVar("T", bound=Tensor)
_TIED = "tied_weights"  # in a checkpoint: names of weights that stand there under another
WEIGHTS = "state_dict/"  # begins the paths of the module's tensors
_FILE_BYTES = 2**30  # a file is put together in memory before it is written


def save(checkpoint: dict[str, Any], folder: Path, model: nn.Module) -> None:
    """Write ``checkpoint`` of ``model`` into ``folder`` under another name, which it is given when all ranks are done.

    What has the name before stays until then, and a run that is killed meanwhile leaves it.

    Raises:
        AllRanksError: on every rank, if one cannot write its shards.
        Exception: on rank 0, which cannot make the folder or write the rest; the others raise :class:`RolloutError` then.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    # files must not hold a tensor twice, and the reference is in none
    tied = {name: first for name, first in _tied(model).items() if name in checkpoint["state_dict"]}
    weights = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in tied}
    checkpoint = {**checkpoint, "state_dict": weights, _TIED: tied}
    shards = dict(_tensors(checkpoint, DTensor))

    def begin() -> None:
        for left in folder.parent.glob(f".*{UNFINISHED}/"):
            shutil.rmtree(left)  # of a run that was killed
        unfinished.mkdir(parents=True)

    def finish() -> None:
        write_whole(_without_shards(checkpoint), unfinished / META)
        put(unfinished, folder)

    from_rank_zero(begin)
    writer = HuggingFaceStorageWriter(str(unfinished), fqn_to_index_mapping=_files(shards), save_distributed=True)
    try:
        save_tensors(shards, storage_writer=writer)
    except CheckpointException as error:  # no Exception: it would pass by whatever ends a run in order
        reasons = "; ".join(f"rank {rank}: {failure!r}" for rank, (failure, _) in error.failures.items())
        raise AllRanksError(f"the checkpoint {str(folder)!r} cannot be written: {reasons}") from error
    from_rank_zero(finish)


class ReadsShards(WeightsOnly):
    """Reads the folders of sharded runs too, for runs that are not, each of whose ranks has a copy then."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises :class:`ConfigError` for what is no checkpoint, or holds other objects than tensors and plain values."""
        path = standing(path)
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)
        return _whole(Path(path), super().load_checkpoint(Path(path, META), *args, **kwargs))


@torch.no_grad()
def load(path: Path, rest: Mapping[str, Any], model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Read the shards in the folder ``path``, and what ``rest`` has beside them, into ``model`` and ``optimizers``.

    Where ``path`` is the file of a run that was not sharded, ``rest`` has everything.  Parameters that neither has must be
    frozen, and stay as they are: the reference is one.

    Raises:
        ConfigError: something that is trained is missing, or the model has no place for what is there, or there are optimizers
            and only weights.
    """
    weights = cast("dict[str, Tensor]", get_model_state_dict(model))
    states = [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers]
    # an evaluation has no optimizer, and a checkpoint may hold weights alone
    plain = list(rest.get("optimizer_states", []))[: len(states)]
    if len(plain) < len(states):
        raise ConfigError(
            f"ckpt_path: {str(path)!r} holds weights alone, which can be evaluated and exported; a run that begins with them "
            "takes what export writes as its model.policy.path"
        )
    tied = _tied(model)
    once = {name: tensor for name, tensor in weights.items() if name not in tied}
    wanted = dict(_tensors({"state_dict": once, "optimizer_states": states}, DTensor))
    whole: dict[str, Tensor] = {}
    if path.is_dir():
        reader = HuggingFaceStorageReader(str(path))
        held: dict[str, Any] = reader.read_metadata().state_dict_metadata
        shapes = {name: tensor.size for name, tensor in held.items()}
    else:
        reader = None
        plain = [_by_name(path, saved, state) for saved, state in zip(plain, states, strict=True)]
        whole = dict(_tensors({"state_dict": rest["state_dict"], "optimizer_states": plain}, Tensor))
        shapes = {name: tensor.shape for name, tensor in whole.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_weights = {name.removeprefix(WEIGHTS): shape for name, shape in shapes.items() if name.startswith(WEIGHTS)}
    check_same_model(of_weights, weights, [name for name in once if name in trained and isinstance(once[name], DTensor)])
    if missing := sorted(name for name in wanted.keys() - shapes.keys() if not name.startswith(WEIGHTS)):
        raise ConfigError(f"ckpt_path: {str(path)!r} lacks {len(missing)} optimizer states of this run, {missing[0]} for one")
    found = {name: tensor for name, tensor in wanted.items() if name in shapes}
    if reader is not None:
        load_tensors(found, storage_reader=reader)
    else:
        for name, tensor in found.items():
            copy_part(tensor, whole[name])
    plain_weights = {n: t for n, t in rest["state_dict"].items() if not isinstance(weights.get(n), DTensor)}
    model.load_state_dict(plain_weights, strict=False)
    for optimizer, state, saved in zip(optimizers, states, plain, strict=True):
        set_optimizer_state_dict(model, optimizer, _joined(saved, state), options=StateDictOptions())


def _whole(folder: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """``rest`` with the shards in ``folder``, put together: what a run that is not sharded would have saved."""
    reader = HuggingFaceStorageReader(str(folder))
    held: dict[str, Any] = reader.read_metadata().state_dict_metadata
    shards = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in held.items()}
    load_tensors(dict(shards), storage_reader=reader, no_dist=True)
    for name, tensor in shards.items():
        *path, last = name.split("/")
        place: Any = rest
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[last] = tensor
    rest["state_dict"] |= {name: rest["state_dict"][first] for name, first in rest[_TIED].items()}
    if "optimizer_states" in rest:  # else it holds weights alone
        rest["optimizer_states"] = [_by_number(state) for state in rest["optimizer_states"]]
    return rest


def _tied(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that have several, each with the first."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if name != first[parameter]}


def _by_name(path: Path, saved: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as it is ``saved``, its parameters counted, with the names that they have in ``state``."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    count = sum(len(group["params"]) for group in saved["param_groups"])
    if count != len(names):
        raise ConfigError(f"ckpt_path: {str(path)!r} is of another model: it trains {count} parameters, this one {len(names)}")
    return {
        "state": {names[number]: values for number, values in saved["state"].items()},
        "param_groups": [{**group, "params": [names[n] for n in group["params"]]} for group in saved["param_groups"]],
    }


def _by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by its parameters' names, as it is saved where they are counted."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [{**group, "params": [numbers[n] for n in group["params"]]} for group in state["param_groups"]],
    }


def _tensors(tree: Any, kind: type[T], path: str = "") -> Iterator[tuple[str, T]]:
    """The tensors of a kind in nested mappings and lists, by their path."""
    if isinstance(tree, kind):
        yield path, tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, kind, f"{path}/{key}" if path else str(key))


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
