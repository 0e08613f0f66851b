"""Trust regions as settings: those that a run was made with, and those that a file names, by the rules of ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from cppo_lightning.errors import ConfigError
from cppo_lightning.trust_regions import TrustRegion

T = TypeVar("T")
_OURS = ("cppo_lightning.trust_regions.", "cppo_lightning.divergences.", "cppo_lightning.mismatch.")


def settings_of(value: Any) -> Any:
    """``value`` as YAML would give it: dataclasses as ``class_path`` and ``init_args``, defaults included.

    What a class that is no dataclass was made with cannot be told; its ``init_args`` are null.
    """
    if isinstance(value, list | tuple):
        return [settings_of(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): settings_of(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)
    given = {f.name: settings_of(getattr(value, f.name)) for f in fields(value) if f.init} if is_dataclass(value) else None
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": given}


def is_ours(settings: Any) -> bool:
    """Whether all classes in ``settings_of`` something are this package's own, so that making it imports nothing else."""
    if isinstance(settings, Mapping):
        named = "class_path" not in settings or (
            str(settings["class_path"]).startswith(_OURS) and settings.get("init_args") is not None
        )
        return named and all(is_ours(value) for value in settings.values())
    return all(is_ours(value) for value in settings) if isinstance(settings, list) else True


def made_from(settings: Any, kind: type[T], where: str) -> T:
    """The object that ``class_path`` and ``init_args`` name, as ``fit`` would make it.

    Args:
        settings: a mapping, or a class's name alone.
        kind: what it has to be.
        where: names file and key in messages.

    Raises:
        ConfigError: it is none, or a value is out of range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_argument("--made", type=kind)
    try:
        # jsonargparse writes what it has parsed into what it is given
        return parser.instantiate(parser.parse_object({"made": deepcopy(settings)}))["made"]
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(f"{where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What a trust region itself has to say, else the parser's words on one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else " ".join(str(error).split())


def load_region(file: Path) -> TrustRegion:
    """``model.trust_region`` of a YAML file, which may hold other keys: ``configs/trust_region/*.yaml``, or a run's config.

    Raises:
        ConfigError: the file cannot be read, has no such key, or it names no trust region.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    where = f"--config {str(file)!r}"
    try:
        found = OmegaConf.select(OmegaConf.create({"file": OmegaConf.load(file)}), "file.model.trust_region")
        settings = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    if settings is None:
        raise ConfigError(f"{where} has no model.trust_region; take a file such as configs/trust_region/cppo.yaml")
    return made_from(settings, TrustRegion, f"{where}: model.trust_region")
