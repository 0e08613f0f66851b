"""Checkpoints and model folders come from elsewhere: they are read as data, and no code in them is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from cppo_lightning.errors import ConfigError

# what Lightning looks up when the run starts, in place of a path
_NAMES = ("best", "last", "hpc", "registry")
_KEYS = {"state_dict", "pytorch-lightning_version"}  # of every checkpoint that a Trainer saves


class WeightsOnly(_WrappingCheckpointIO):
    """Reads checkpoints as tensors and plain values, whatever is asked of it: unpickling anything else can run any code.

    Lightning by itself unpickles what it downloads from a URL.
    """

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises :class:`ConfigError` for a file that is no checkpoint, or holds other objects."""
        with refusing(path):
            return _checked(path, super().load_checkpoint(path, *args, **{**kwargs, "weights_only": True}))


def check_checkpoint(path: str) -> None:
    """Raise :class:`ConfigError` if the file ``path`` is missing, no checkpoint, or holds more than tensors and plain values.

    Tensors are not read.  URLs, folders and names such as ``last`` are left to :class:`WeightsOnly`.
    """
    if path.partition(":")[0] in _NAMES or "://" in path or Path(path).is_dir():
        return
    with refusing(path), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # only in this format can tensors be left unread
            raise EOFError("not a file of torch.save")
        _checked(path, torch.load(path, map_location="meta", weights_only=True, mmap=True))


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
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _KEYS:
        raise ConfigError(f"ckpt_path: {str(path)!r} was not saved by a Trainer: it lacks {sorted(_KEYS)}")
    return checkpoint


def _first_sentence(error: BaseException) -> str:
    return f"{error}".partition("\n")[0].partition(". ")[0] or type(error).__name__


def check_no_code(model: str) -> None:
    """Raise :class:`ConfigError` if ``model``, a folder or hub id, is of a type that only Python code of its own could load.

    Such code is never run.  Where transformers has the type itself, code in the folder is ignored.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers import __version__ as version

    settings, _ = PretrainedConfig.get_config_dict(model)
    kind = settings.get("model_type")
    if "auto_map" in settings and kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.policy.path {model!r} comes with Python code of its own (auto_map in config.json), which is never run, and "
            f"transformers {version} has no model type {kind!r}; take a model of a type that it has"
        )
