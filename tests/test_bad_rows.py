"""Bad input: every row that cannot be used is named by file and line, or skipped and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import BadRowError, BadRows, DatasetPrompts, LoadCounts, PromptSource, check_problems
from cppo_lightning.verifiers import MathAnswer, Problem, VerifierPool
from tests.moody import Moody
from tests.test_prompts import write

GOOD = {"id": "a", "problem": "1 + 1 = ?", "answer": "2"}

BAD_ROWS = [
    ({"id": "b", "answer": "2"}, "no problem: there is no column 'problem', only \\['answer', 'id'\\]"),
    ({"id": "b", "problem": "  ", "answer": "2"}, "no problem: 'problem' must end in a text of the user's"),
    ({"id": "b", "problem": 7, "answer": "2"}, "no problem: 'problem' must be a text or a list of messages, got 7"),
    ({"id": "b", "problem": "?"}, "no answer: there is no column 'answer', only \\['id', 'problem'\\]"),
    ({"id": "b", "problem": "?", "answer": ""}, "no answer"),
    ({"id": "b", "problem": "?", "answer": None}, "no answer: 'answer' must be a text or number, got None"),
    ({"id": "b", "problem": "?", "answer": True}, "no answer"),
    ({"id": "b", "problem": "?", "answer": ["2"]}, r"no answer: 'answer' must be a text or number, got \['2'\]"),
    ('{"problem": "?", "answer": NaN}', "no answer"),
    ({"problem": "?", "answer": r"so \boxed{1"}, "no answer: the .*boxed of 'answer' has nothing in it or no end"),
    ({"problem": "?", "answer": r"so \boxed{} and"}, "no answer: the .*boxed of 'answer' has nothing in it or no end"),
    ({"problem": "?", "answer": "so\n#### \n"}, "no answer: 'answer' must not be empty"),
    (
        {"problem": [{"role": "assistant", "content": "?"}], "answer": "1"},
        "no problem: 'problem' must end in a text of the user's",
    ),
    ({"id": 1.5, "problem": "?", "answer": "2"}, "bad id: the id 'id' must be a text or an integer, got 1.5"),
    ({"id": "a", "problem": "?", "answer": "2"}, "repeated id: the id 'a' was used before, at .*bad.jsonl:2"),
    ('{"problem": "?", "answer": "2"', "not valid JSON: Expecting ',' delimiter"),
    ("[1, 2]", "not an object: a row must be a JSON object, got list"),
    ("[" * 100_000, "not valid JSON: "),
    ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "2"}}, "no problem: 'prompt' must be a list of messages"),
    (
        {"prompt": [], "reward_model": {"ground_truth": "2"}},
        "no problem: 'prompt' must end in a text of the user's, got \\[\\]",
    ),
    (
        {"prompt": [{"role": "user", "content": "?"}], "reward_model": None},
        "no answer: there is no column 'reward_model.ground_truth', only \\['prompt'\\]",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    """The bad row is on line 5; an empty line comes first and another before it."""
    path = write(tmp_path / "bad.jsonl", "", GOOD, GOOD | {"id": "c"}, "", row)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl:5: {message}"):
        DatasetPrompts(path).load()


def test_bad_bytes_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "caf\xe9", "answer": "2"}\n')
    with pytest.raises(ConfigError, match=r"latin\.jsonl:2: not UTF-8"):
        DatasetPrompts(str(path)).load()


def test_bad_parquet_row_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [GOOD, GOOD | {"id": "b", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet, row 2: no answer"):
        DatasetPrompts(str(tmp_path / "bad.parquet")).load()
    (tmp_path / "text.parquet").write_text("this is no parquet file")
    with pytest.raises(ConfigError, match=r"cannot load '.*text\.parquet'"):
        DatasetPrompts(str(tmp_path / "text.parquet")).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"there is no file .*none\.jsonl"),
        ("empty.jsonl", "", r"empty\.jsonl has no problems"),
        ("blank.jsonl", "\n\n", r"blank\.jsonl has no problems"),
        ("list.json", "[]", r"list\.json has no problems"),
        ("object.json", "{}", r"must be a JSON list of objects, got dict"),
        (
            "items.json",
            '[{"problem": "?", "answer": "1"}, 3]',
            r"items\.json, row 2: not an object: a row must be a JSON object, got int",
        ),
        ("table.csv", "a,b", r"must end in one of \.jsonl, \.json, \.parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        DatasetPrompts(str(tmp_path / name)).load()


def test_bad_dataset_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in [({"path": ""}, "path is empty"), ({"path": "a.jsonl", "limit": 0}, "limit must be at least 1")]:
        with pytest.raises(ConfigError, match=message):
            DatasetPrompts(**settings)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot load 'nobody/nothing'"):
        DatasetPrompts("nobody/nothing").load()


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_nothing_to_train_on_is_an_error_in_both_modes(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("empty.json" if content == "[]" else "empty.jsonl")
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"has no problems$"):
        DatasetPrompts(str(path)).load(BadRows(skip=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf16.json", "[]".encode("utf-16"), "not UTF-8"),
        ("cut.json", b'[{"problem": "?"', "not valid JSON"),
        ("object.json", b"{}", "must be a JSON list"),
        ("utf16.jsonl", json.dumps(GOOD).encode("utf-16"), r"has no problems: 1 not UTF-8; first: .*utf16\.jsonl:1"),
        ("text.parquet", b"this is no parquet file", "cannot load"),
    ],
)
def test_an_unreadable_file_is_an_error_in_both_modes(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        DatasetPrompts(str(tmp_path / name)).load(BadRows(skip=True))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "private.jsonl", GOOD)
    monkeypatch.setattr("os.access", lambda file, mode: str(file) != path)  # root may read everything
    with pytest.raises(ConfigError, match=r"private\.jsonl may not be read"):
        DatasetPrompts(path).load(BadRows(skip=True))


def test_skipped_rows_are_counted_by_reason_and_the_first_few_are_kept(tmp_path: Path) -> None:
    """Every bad row of the table above, each in its own line of one file, with good ones around and between them."""
    good = [GOOD | {"id": f"good-{i}"} for i in range(len(BAD_ROWS))]
    lines = [row for i, (bad, _) in enumerate(BAD_ROWS) for row in (good[i], bad)]
    path = write(tmp_path / "mixed.jsonl", GOOD, *lines)
    rows = BadRows(skip=True)
    problems = DatasetPrompts(path).load(rows)
    assert [p.id for p in problems] == ["a", *(row["id"] for row in good)]
    assert [p.source for p in problems[1:3]] == [f"{path}:2", f"{path}:4"]
    assert rows.counts == LoadCounts(rows=1 + 2 * len(BAD_ROWS), bad=len(BAD_ROWS))
    assert len(problems) == rows.rows - rows.counts.bad
    reasons = {reason: sum(re.match(reason, message) is not None for _, message in BAD_ROWS) for reason in rows.reasons}
    assert sum(reasons.values()) == len(BAD_ROWS), "each message of the table begins with its reason"
    assert rows.reasons == reasons
    assert len(rows.examples) == 5
    assert rows.examples[0].startswith(f"{path}:3: no problem: there is no column 'problem'")
    assert rows.summary().startswith(f"{reasons['no answer']} no answer, ")
    assert rows.summary().endswith(f"first: {rows.examples[0]}")
    assert len(DatasetPrompts(path, limit=7).load(BadRows(skip=True))) == 7, "a limit counts problems, not rows"


def test_bytes_that_are_not_utf8_are_skipped_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "caf\xe9", "answer": "2"}\n')
    rows = BadRows(skip=True)
    assert [p.id for p in DatasetPrompts(str(path)).load(rows)] == ["a"]
    assert rows.reasons == {"not UTF-8": 1}


def test_answers_that_cannot_be_judged_stop_the_run(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "b", "answer": r"\frac{1}{2"}, GOOD | {"id": "c", "answer": "}"}]
    problems = DatasetPrompts(write(tmp_path / "odd.jsonl", *rows)).load()
    with pytest.raises(ConfigError, match=r"problem 'b' \(.*odd\.jsonl:2\): cannot be judged by MathAnswer: .*braces.*2 of 3"):
        check_problems(problems, MathAnswer())
    check_problems(problems[:1], MathAnswer())


def test_answers_that_cannot_be_judged_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "b", "answer": r"\frac{1}{2"}, GOOD | {"id": "c", "answer": "}"}, GOOD | {"id": "d"}]
    path = write(tmp_path / "odd.jsonl", *rows)
    counts = BadRows(skip=True)
    problems = DatasetPrompts(path).load(counts)
    assert [p.id for p in check_problems(problems, MathAnswer(), counts)] == ["a", "d"]
    assert counts.counts == LoadCounts(rows=4, bad=2)
    assert counts.reasons == {"cannot be judged by MathAnswer": 2}
    assert counts.examples[0].startswith(f"problem 'b' ({path}:2): cannot be judged by MathAnswer: ")
    with pytest.raises(ConfigError, match=r"problem 'b' .* \(2 of 2 are like this\)"):
        check_problems(problems[1:3], MathAnswer(), BadRows(skip=True))


@pytest.mark.parametrize("skip", [False, True])
def test_a_check_that_is_late_is_tried_again_and_never_skipped(tmp_path: Path, skip: bool) -> None:
    """What is left out must not depend on how busy a machine is."""
    answers = ("1", f"sleep_once {tmp_path / 'flag'}", "sleep")
    good, busy, slow = (Problem("abc"[i], (), answer) for i, answer in enumerate(answers))
    with VerifierPool(Moody(), deadline=0.5) as pool:
        counts = BadRows(skip)
        assert check_problems([good, busy], pool, counts) == [good, busy]
        assert counts.counts == LoadCounts()
        message = r"problem 'c' .*Moody has twice not checked it in VerifierPool\.deadline = 0\.5 s; raise the deadline.*1 of 2"
        with pytest.raises(ConfigError, match=message):
            check_problems([good, slow], pool, counts)


def test_counts_of_parts_add_up() -> None:
    whole, part = BadRows(skip=True), BadRows(skip=True)
    for rows, reasons in ((whole, "xyz"), (part, "zzzz")):
        for reason in reasons:
            with rows.row():
                raise BadRowError("f:1", reason, "detail")
    part.repeated, part.conflicting = 2, 1
    whole.merge(part)
    assert whole.counts == LoadCounts(rows=7, repeated=2, conflicting=1, bad=7)
    assert whole.reasons == {"x": 1, "y": 1, "z": 5}
    assert whole.examples == [f"f:1: {reason}: detail" for reason in "xyzzz"]
    assert whole.summary() == "5 z, 1 x, 1 y; first: f:1: x: detail"
    assert BadRows().summary() == ""


def test_a_source_whose_load_knows_nothing_of_bad_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Mine\.load must take .*def load\(self, bad_rows=None\)"):

        class Mine(PromptSource):
            def load(self) -> list[Problem]:  # pyright: ignore[reportIncompatibleMethodOverride]
                return []
