"""Checkpoints and model folders come from elsewhere: they are read as data, and no code in them is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from cppo_lightning.errors import ConfigError
from cppo_lightning.replacing import names_to_disk, standing

# what Lightning looks up when the run starts, in place of a path
_NAMES = ("best", "last", "hpc", "registry")
META = "meta.pt"  # in a sharded checkpoint, which is a folder: what is not in shards (Lightning's name)
UNFINISHED = ".unfinished"
_KEYS = {"state_dict", "pytorch-lightning_version"}  # of every checkpoint that a Trainer saves


class WeightsOnly(_WrappingCheckpointIO):
    """Reads checkpoints as tensors and plain values, whatever is asked of it: unpickling anything else can run any code.

    Lightning by itself unpickles what it downloads from a URL, and writes a checkpoint twice: whole in memory, then to a
    temporary folder, which is perhaps on another disk and left full by a kill.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write beside ``path`` and rename: what has the name is whole, at any moment and whatever is killed."""
        if type(self.checkpoint_io) is TorchCheckpointIO and "://" not in str(path):
            write_whole(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, *args, **kwargs)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises :class:`ConfigError` for a file that is no checkpoint, or holds other objects."""
        with refusing(path):
            return _checked(path, super().load_checkpoint(path, *args, **{**kwargs, "weights_only": True}))


def write_whole(value: Any, path: Path) -> None:
    """``torch.save`` to a :func:`whole_file`."""
    with whole_file(path) as file:
        torch.save(value, file)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which has its name only when all of it is on the disk.

    A run that is killed meanwhile leaves a hidden file, which the next call for this folder removes: no two runs share one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*{UNFINISHED}"):
        if left.is_file():
            left.unlink()
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    names_to_disk(path.parent)


def check_checkpoint(path: str) -> dict[str, Any]:
    """What the checkpoint ``path`` holds, tensors without their values.

    The shards in a folder, which are safetensors, are not read.  URLs and names such as ``last`` are left to
    :class:`WeightsOnly`, and empty here.

    Raises:
        ConfigError: the file is missing, no checkpoint, or holds more than tensors and plain values.
    """
    if path.partition(":")[0] in _NAMES or "://" in path:
        return {}
    path = standing(path)
    if Path(path).is_dir():
        path = str(Path(path, META))
    with refusing(path), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # only in this format can tensors be left unread
            raise EOFError("not a file of torch.save")
        return _checked(path, torch.load(path, map_location="meta", weights_only=True, mmap=True))


@contextmanager
def refusing(path: Any) -> Iterator[None]:
    """What loading the checkpoint ``path`` with ``weights_only`` raises becomes a :class:`ConfigError` of one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own message recommends to load the file without this protection
        reason = _first_sentence(error.__context__ or error)
        raise ConfigError(
            f"ckpt_path: {str(path)!r} holds more than tensors and plain values and is not loaded, since that could run any "
            f"code ({reason}); take a checkpoint that a Trainer has saved"
        ) from error
    except OSError as error:
        raise ConfigError(f"ckpt_path: cannot read the checkpoint {str(path)!r}: {error}") from error
    except (RuntimeError, EOFError, KeyError) as error:  # of a file that ends too soon, or in another format
        raise ConfigError(
            f"ckpt_path: {str(path)!r} is no checkpoint, or not a whole one ({_first_sentence(error)})"
        ) from error


def _checked(path: Any, checkpoint: Any) -> dict[str, Any]:
    if missing := _KEYS - (checkpoint.keys() if isinstance(checkpoint, dict) else set()):
        raise ConfigError(f"ckpt_path: {str(path)!r} was not saved by a Trainer: it lacks {sorted(missing)}")
    return checkpoint


def _first_sentence(error: BaseException) -> str:
    return f"{error}".partition("\n")[0].partition(". ")[0] or type(error).__name__


def check_no_code(model: str) -> None:
    """Refuse ``model``, a folder or hub id, of a type that transformers has not, such as one that comes with Python code.

    Such code is never run.  Where transformers has the type itself, code in the folder is ignored.

    Raises:
        ConfigError: it is of such a type, or has no ``config.json`` that can be read.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers import __version__ as version

    try:
        settings, _ = PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise ConfigError(f"model.policy.path {model!r} should have a config.json that can be read: {error}") from error
    kind = settings.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in settings:
        raise ConfigError(
            f"model.policy.path {model!r} comes with Python code of its own (auto_map in config.json), which is never run, and "
            f"transformers {version} has no model type {kind!r}; take a model of a type that it has"
        )
    raise ConfigError(
        f"model.policy.path {model!r}: model_type in its config.json should be one of transformers {version}, got {kind!r}"
    )
