"""Problems from a file or from the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.rollout.prompt_source import PromptSource
from cppo_lightning.verifiers.base import Problem

_LOG = logging.getLogger(__name__)
_FILES = (".jsonl", ".json", ".parquet")

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its columns


@dataclass(frozen=True)
class DatasetPrompts(PromptSource):
    """Rows of a local ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file, of a local folder, or of a hub data set.

    Rows in the layout of DAPO-Math (``prompt`` a list of messages, ``reward_model.ground_truth``, ``extra_info.index``) are
    recognised; there, repeated rows are dropped, and so are prompts with conflicting answers.  Of an answer in GSM8K's layout
    (``... #### 42``) only what follows the mark is taken.

    Args:
        path: a file, a folder or a hub id such as ``openai/gsm8k``.
        split: split of a folder or hub data set.
        name: configuration of a hub data set, where it has several.
        problem_key: column of the problem's text.
        answer_key: column of the answer.
        id_key: column of the id; rows without it are numbered.
        limit: keep only the first so many problems.
    """

    path: str
    split: str = "train"
    name: str | None = None
    problem_key: str = "problem"
    answer_key: str = "answer"
    id_key: str = "id"
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("DatasetPrompts.path is empty: give a .jsonl, .json or .parquet file, or a hub id")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"DatasetPrompts.limit must be at least 1 or null, got {self.limit}")

    def load(self) -> list[Problem]:
        """The problems in the order of the rows.

        Raises:
            ConfigError: no such file or data set, no rows, or a row that is no problem, named by file and line (or row).
        """
        problems: list[Problem] = []
        dapo = _DapoRows(self.path)
        for number, (place, row) in enumerate(self._rows(), start=1):
            if _is_dapo(row):
                dapo.add(_dapo_problem(row, place, f"{Path(self.path).stem}-{number}"))
            else:
                problems.append(self._problem(row, place, number))
            if self.limit is not None and len(problems) == self.limit:
                break
        problems += dapo.problems()
        if not problems:
            raise ConfigError(f"DatasetPrompts.path: {self.path} has no problems")
        seen: dict[str, str] = {}
        for problem in problems:
            if problem.id in seen:
                raise ConfigError(
                    f"{problem.source}: the id {problem.id!r} was used before, at {seen[problem.id]}; ids must be unique"
                )
            seen[problem.id] = problem.source
        return problems[: self.limit]

    def _rows(self) -> Iterator[Row]:
        file = Path(self.path).expanduser()
        if file.is_file():
            if file.suffix == ".jsonl":
                return _json_lines(file)
            if file.suffix == ".json":
                return _json_list(file)
            if file.suffix == ".parquet":
                return self._hub_rows("parquet", data_files=str(file), split="train")
            raise ConfigError(f"DatasetPrompts.path: {self.path} must end in one of {', '.join(_FILES)}")
        looks_local = (
            file.suffix in _FILES or self.path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path)
        )
        if looks_local and not file.is_dir():
            raise ConfigError(f"DatasetPrompts.path: there is no file {self.path} (looked in {Path.cwd()})")
        return self._hub_rows(str(file) if file.is_dir() else self.path, name=self.name, split=self.split)

    def _hub_rows(self, path: str, **arguments: Any) -> Iterator[Row]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            rows = datasets.load_dataset(path, **arguments)
        except (OSError, ValueError, TypeError, DatasetsError) as error:
            raise ConfigError(
                f"DatasetPrompts.path: cannot load {self.path!r} ({error}); it must be a readable file, or a hub data set "
                "that can be reached or is in the cache, with the right name and split"
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"{self.path}, row {number}", row  # pyright: ignore[reportReturnType]

    def _problem(self, row: Mapping[str, Any], place: str, number: int) -> Problem:
        text = row.get(self.problem_key)
        if not isinstance(text, str) or not text.strip():
            raise _bad(place, f"no problem: {self.problem_key!r} must be a text, got {_show(row, self.problem_key)}")
        answer = _answer(
            row.get(self.answer_key), place, f"{self.answer_key!r} must be a text or number, got {_show(row, self.answer_key)}"
        )
        given = row.get(self.id_key)
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            raise _bad(place, f"the id {self.id_key!r} must be a text or an integer, got {given!r}")
        identity = f"{Path(self.path).stem}-{number}" if given is None else str(given)
        return Problem(identity, ({"role": "user", "content": text},), answer, place)


class _DapoRows:
    """Problems of the DAPO layout, one per prompt."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._first: dict[tuple[tuple[str, str], ...], Problem] = {}
        self._conflicting: set[tuple[tuple[str, str], ...]] = set()
        self._rows = 0

    def add(self, problem: Problem) -> None:
        self._rows += 1
        prompt = tuple((message["role"], message["content"]) for message in problem.messages)
        if self._first.setdefault(prompt, problem).answer != problem.answer:
            self._conflicting.add(prompt)

    def problems(self) -> list[Problem]:
        repeated, conflicting = self._rows - len(self._first), len(self._conflicting)
        if repeated:
            _LOG.warning(
                "%s: %d rows, %d distinct prompts; dropped %d repeated rows and %d prompts with conflicting answers",
                self._path, self._rows, len(self._first), repeated, conflicting,
            )  # fmt: skip
        return [problem for prompt, problem in self._first.items() if prompt not in self._conflicting]


def _is_dapo(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), list) and "reward_model" in row


def _dapo_problem(row: Mapping[str, Any], place: str, fallback_id: str) -> Problem:
    messages = row["prompt"]
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise _bad(place, f"no problem: 'prompt' must be a list of messages with role and content, got {message!r}")
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise _bad(place, "no problem: the last message of 'prompt' must be a text of the role 'user'")
    model = row["reward_model"]
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    answer = _answer(truth, place, f"'reward_model.ground_truth' must be a text or number, got {str(model)[:80]}")
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Problem(fallback_id if index is None else str(index), turns, answer, place)


def _answer(value: Any, place: str, complaint: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) in ("nan", "inf", "-inf"):
        raise _bad(place, f"no answer: {complaint}")
    text = str(value)
    if isinstance(value, str) and "\n#### " in text:
        text = text.rpartition("\n#### ")[2]
    if not text.strip():
        raise _bad(place, f"no answer: {complaint}")
    return text.strip()


def _show(row: Mapping[str, Any], key: str) -> str:
    return repr(row[key])[:80] if key in row else f"columns {sorted(row)}"


def _bad(place: str, complaint: str) -> ConfigError:
    return ConfigError(f"{place}: {complaint}")


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{file}:{number}"
                row = _parse_json(line, place)
                if not isinstance(row, dict):
                    raise _bad(place, f"must be a JSON object, got {type(row).__name__}")
                yield place, row


def _json_list(file: Path) -> Iterator[Row]:
    rows = _parse_json(file.read_bytes(), str(file))
    if not isinstance(rows, list):
        raise _bad(
            str(file), f"must be a JSON list of objects, got {type(rows).__name__}; one object per line goes into a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _bad(f"{file}, row {number}", f"must be a JSON object, got {type(row).__name__}")
        yield f"{file}, row {number}", row


def _parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _bad(place, f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise _bad(place, "JSON nested too deep") from error
    except json.JSONDecodeError as error:
        raise _bad(place, f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
