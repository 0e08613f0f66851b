"""Problems from a file or from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRowError, BadRows
from cppo_lightning.prompts.dapo import DAPO_KEYS, bare_question, dapo_columns, is_dapo
from cppo_lightning.prompts.data_rows import columns, raw_rows
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.verifiers.base import Problem
from cppo_lightning.verifiers.normalise import last_boxed

_GSM8K_MARK = re.compile(r"(?:\A|\n)#### ?")
_BOX_WITHOUT_BRACES = re.compile(r"\\boxed\s+([^\s${}\\]+)")


@dataclass(frozen=True)
class DatasetPrompts(PromptSource):
    r"""Rows of a local ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file, of a local folder, or of a hub data set.

    A problem is a text or a list of chat messages.  Its answer is a number or a text, of which only the answer proper is taken:
    what follows ``####`` (GSM8K), else the last ``\boxed{...}`` (the ``solution`` of MATH and of ``math-ai/aime24``), else all.

    Rows in the layout of DAPO-Math (``prompt`` a list of messages, ``reward_model.ground_truth``, ``extra_info.index``) are
    recognised whatever the keys say; of these, rows with the same question are one problem, and a question with conflicting
    answers is none.

    Args:
        path: a file, a folder or a hub id such as ``openai/gsm8k``.
        split: split of a folder or hub data set; a file has none.
        name: configuration of a hub data set, where it has several.
        problem_key: column of the problem.
        answer_key: column of the answer, or of a solution that ends in it.
        id_key: column of the id; rows without it are numbered.
        strip_instructions: take off what DAPO-Math writes around a question, so that the template alone says how to answer.
        limit: keep only the first so many problems.
    """

    path: str
    split: str = "train"
    name: str | None = None
    problem_key: str = "problem"
    answer_key: str = "answer"
    id_key: str = "id"
    strip_instructions: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("DatasetPrompts.path is empty: give a .jsonl, .json or .parquet file, or a hub id")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"DatasetPrompts.limit must be at least 1 or null, got {self.limit}")

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        """The problems in the order of the rows.

        Raises:
            ConfigError: no such file or data set, no row that is a problem, or (strict) a row that is none, by file and line.
        """
        counts = BadRows() if bad_rows is None else bad_rows
        own_keys = (self.problem_key, self.answer_key, self.id_key)
        distinct = _Distinct(counts)
        for number, (place, raw) in enumerate(raw_rows(self.path, self.split, self.name), start=1):
            with counts.row():
                row = columns(raw, place)
                if is_dapo(row):
                    problem = self._problem(dapo_columns(row), DAPO_KEYS, place, number)
                    distinct.add(problem, tuple((m["role"], bare_question(m["content"])) for m in problem.messages))
                else:
                    distinct.add(self._problem(row, own_keys, place, number), number)
                    if len(distinct.kept) == self.limit:
                        break
        problems = distinct.problems()
        if not problems:
            why = f": {counts.summary()}" if counts.reasons else ""
            raise ConfigError(f"DatasetPrompts.path: {self.path} has no problems{why}")
        return problems[: self.limit]

    def _problem(self, row: Mapping[str, Any], keys: tuple[str, str, str], place: str, number: int) -> Problem:
        for what, key in zip(("problem", "answer"), keys, strict=False):
            if key not in row:
                raise BadRowError(place, f"no {what}", f"there is no column {key!r}, only {sorted(row)}")
        problem_key, answer_key, id_key = keys
        messages = _messages(row[problem_key], place, problem_key)
        if self.strip_instructions:
            asked = bare_question(messages[-1]["content"])
            if not asked:
                raise BadRowError(place, "no problem", f"{problem_key!r} holds instructions and no question")
            messages = (*messages[:-1], {"role": "user", "content": asked})
        given = row.get(id_key)
        if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
            raise BadRowError(place, "bad id", f"the id {id_key!r} must be a text or an integer, got {given!r}")
        identity = f"{Path(self.path).stem}-{number}" if given is None else str(given)
        return Problem(identity, messages, _answer(row[answer_key], place, answer_key), place)


class _Distinct:
    """Problems under the key that makes them one and the same; their ids are unique."""

    def __init__(self, counts: BadRows) -> None:
        self.counts = counts
        self.kept: dict[Hashable, Problem] = {}
        self._conflicting: set[Hashable] = set()
        self._places: dict[str, str] = {}  # by id

    def add(self, problem: Problem, key: Hashable) -> None:
        if (first := self.kept.get(key)) is not None:
            self.counts.repeated += 1
            if first.answer != problem.answer:
                self._conflicting.add(key)
        elif problem.id in self._places:
            before = f"the id {problem.id!r} was used before, at {self._places[problem.id]}; ids must be unique"
            raise BadRowError(problem.source, "repeated id", before)
        else:
            self._places[problem.id] = problem.source
            self.kept[key] = problem

    def problems(self) -> list[Problem]:
        self.counts.conflicting += len(self._conflicting)
        return [problem for key, problem in self.kept.items() if key not in self._conflicting]


def _messages(value: Any, place: str, key: str) -> tuple[dict[str, str], ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise BadRowError(place, "no problem", f"{key!r} must be a text or a list of messages, got {_short(value)}")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise BadRowError(
                place, "no problem", f"{key!r} must be a list of messages with role and content, got {_short(message)}"
            )
    if not value or value[-1]["role"] != "user" or not value[-1]["content"].strip():
        raise BadRowError(place, "no problem", f"{key!r} must end in a text of the user's, got {_short(value)}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _answer(value: Any, place: str, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) in ("nan", "inf", "-inf"):
        raise BadRowError(place, "no answer", f"{key!r} must be a text or number, got {_short(value)}")
    text = str(value)
    if marks := list(_GSM8K_MARK.finditer(text)):
        text = text[marks[-1].end() :]
    elif "\\boxed" in text:
        bare = _BOX_WITHOUT_BRACES.findall(text)
        found = last_boxed(text) or (bare[-1] if bare else None)
        if found is None:
            raise BadRowError(place, "no answer", f"the \\boxed of {key!r} has nothing in it or no end: {_short(text)}")
        text = found
    if not text.strip():
        raise BadRowError(place, "no answer", f"{key!r} must not be empty, got {_short(value)}")
    return text.strip()


def _short(value: Any) -> str:
    return f"{value!r:.80}"
