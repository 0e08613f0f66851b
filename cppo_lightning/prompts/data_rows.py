"""Rows of files and hub data sets, each with the place where it stands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRowError

_FILES = (".jsonl", ".json", ".parquet")

RawRow = tuple[str, Any]  # where it stands, and a line's bytes or what was read already


def raw_rows(path: str, split: str, name: str | None) -> Iterator[RawRow]:
    """Rows as they stand in a file, a folder or a hub data set; :func:`columns` reads one.

    Raises:
        ConfigError: there is no such file or data set, or it cannot be read as a whole.
    """
    file = Path(path).expanduser()
    if file.is_file():
        if not os.access(file, os.R_OK):
            raise ConfigError(f"DatasetPrompts.path: {path} may not be read by this user; change its permissions")
        if file.suffix == ".jsonl":
            return _lines(file)
        if file.suffix == ".json":
            return _json_list(file)
        if file.suffix == ".parquet":
            return _table_rows(path, "parquet", data_files=str(file), split="train")
        raise ConfigError(f"DatasetPrompts.path: {path} must end in one of {', '.join(_FILES)}")
    looks_local = file.suffix in _FILES or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    if looks_local and not file.is_dir():
        raise ConfigError(f"DatasetPrompts.path: there is no file {path} (looked in {Path.cwd()})")
    return _table_rows(path, str(file) if file.is_dir() else path, name=name, split=split)


def columns(raw: Any, place: str) -> Mapping[str, Any]:
    """The columns of a raw row.  Raises :class:`BadRowError` if it is no object, or a line that is not UTF-8 or not JSON."""
    row = _parse_json(raw, place) if isinstance(raw, bytes) else raw
    if not isinstance(row, Mapping):
        raise BadRowError(place, "not an object", f"a row must be a JSON object, got {type(row).__name__}")
    return row


def _lines(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", line


def _json_list(file: Path) -> Iterator[RawRow]:
    rows = _parse_json(file.read_bytes(), str(file))
    if not isinstance(rows, list):
        raise ConfigError(
            f"{file}: must be a JSON list of objects, got {type(rows).__name__}; one object per line goes into a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


def _table_rows(path: str, loader: str, **arguments: Any) -> Iterator[RawRow]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(loader, **arguments)
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError) as error:  # RuntimeError: a set with a script
        raise ConfigError(
            f"DatasetPrompts.path: cannot load {path!r} ({error}); it must be a readable file, or a hub data set that can be "
            "reached or is in the cache, with the right name and split"
        ) from error
    number = 0
    # DAPO-Math has 1.8 million rows, and one by one they take twice the time
    for batch in table.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRowError(place, "not UTF-8", f"{error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise BadRowError(place, "not valid JSON", "nested too deep") from error
    except json.JSONDecodeError as error:
        raise BadRowError(place, "not valid JSON", f"{error.msg} (line {error.lineno}, column {error.colno})") from error
