"""Prompt sources: the layouts that are read, and what is made of each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import (
    BadRows,
    DatasetPrompts,
    LoadCounts,
    ReasoningGymPrompts,
    bare_question,
    check_problems,
)
from cppo_lightning.verifiers import MathAnswer, Problem, ReasoningGym, VerifierPool

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
ONE_DIGIT_SUMS = {
    "operators": ["+"],
    "allow_parentheses": False,
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
}


def shared(name: str) -> Path:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    return path


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(MathAnswer()) as pool:
        yield pool


def write(path: Path, *rows: object) -> str:
    """A JSON Lines file; text rows are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_formats_give_the_same_problems(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "a", "problem": "1 + 1 = ?", "answer": "2"}, {"id": "b", "problem": "2 + 3 = ?", "answer": "5"}]
    path = tmp_path / f"sums.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    problems = DatasetPrompts(str(path)).load()
    assert [(p.id, p.messages[0]["content"], p.answer) for p in problems] == [
        (r["id"], r["problem"], r["answer"]) for r in rows
    ]
    assert problems[1].source == (f"{path}:2" if suffix == "jsonl" else f"{path}, row 2")


def test_a_folder_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        write(folder / f"{split}.jsonl", *({"problem": f"{split} {i}?", "answer": str(i)} for i in range(count)))
    problems = DatasetPrompts(str(folder), split="test").load()
    assert [(p.id, p.messages[0]["content"]) for p in problems] == [("sums-1", "test 0?"), ("sums-2", "test 1?")]
    assert problems[1].source == f"{folder}, row 2"
    assert len(DatasetPrompts(str(folder)).load()) == 3
    with pytest.raises(ConfigError, match=r"cannot load .*sums.*validation"):
        DatasetPrompts(str(folder), split="validation").load()


def test_columns_limit_and_number_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"question": f"{i} + 1?", "result": i + 1} for i in range(5)))
    problems = DatasetPrompts(path, problem_key="question", answer_key="result", limit=3).load()
    assert [(p.id, p.answer) for p in problems] == [("q-1", "1"), ("q-2", "2"), ("q-3", "3")]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("He has 2 * 3 = <<2*3=6>>6 apples.\n#### 1,006", "1,006"),  # openai/gsm8k
        ("####-5", "-5"),
        ("#### 3 first\n#### 4", "4"),
        ("a #### in a line", "a #### in a line"),
        (r"\boxed{204}", "204"),  # math-ai/aime24
        (r"So $x=\boxed{3}$, whence the sum is $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),  # MATH
        (r"Thus there are \[\boxed{\left\{1, \{2\}\right\}}\] of them.", r"\left\{1, \{2\}\right\}"),
        (r"The answer is $\boxed 7$, as claimed.", "7"),
        (r" \frac{1}{2} ", r"\frac{1}{2}"),
        (17, "17"),
        (0.5, "0.5"),
    ],
)
def test_only_the_answer_proper_is_taken(tmp_path: Path, written: object, answer: str) -> None:
    path = write(tmp_path / "a.jsonl", {"problem": "?", "solution": written})
    (problem,) = DatasetPrompts(path, answer_key="solution").load()
    assert problem.answer == answer


def test_a_problem_may_be_a_list_of_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write(tmp_path / "m.jsonl", {"prompt": turns, "label": "2"})
    (problem,) = DatasetPrompts(path, problem_key="prompt", answer_key="label").load()
    assert (list(problem.messages), problem.answer) == (turns, "2")


# --- DAPO-Math ---------------------------------------------------------------------------------------------------------------


HEADER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n"
)
BOXED_HEADER = HEADER.replace("$Answer (without quotes)", r"\boxed{$Answer}")
FOOTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo_row(question: str, answer: object, index: str, header: str = HEADER, footer: str = FOOTER) -> dict[str, object]:
    return {
        "prompt": [{"role": "user", "content": header + question + footer}],
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def test_dapo_layout() -> None:
    rows = BadRows()
    problems = DatasetPrompts(str(HERE / "data" / "dapo_layout.jsonl")).load(rows)
    assert [(p.id, p.answer) for p in problems] == [("made-1", "51"), ("made-2", "1024"), ("made-4", "-5")]
    assert problems[0].messages[0]["role"] == "user"
    assert problems[0].messages[0]["content"].startswith("Solve the following")
    assert rows.counts == LoadCounts(rows=7, repeated=3, conflicting=1)
    plain = DatasetPrompts(str(HERE / "data" / "dapo_layout.jsonl"), strip_instructions=True).load()
    assert [p.messages[0]["content"] for p in plain] == [
        "What is 17 times 3?",
        "What is 2 to the power of 10?",
        "What is 4 minus 9?",
    ]


def test_one_question_in_two_dresses_is_one_problem(tmp_path: Path) -> None:
    rows = [
        dapo_row("1 + 1?", "2", "a"),
        dapo_row("1 + 1?", "2", "b", BOXED_HEADER),
        dapo_row("2 + 2?", "4", "c", header=""),
        dapo_row("2 + 2?", "5", "d"),
        dapo_row("1 + 2?", "3", "e"),
    ]
    path, counts = write(tmp_path / "dapo.jsonl", *rows), BadRows()
    assert [p.id for p in DatasetPrompts(path).load(counts)] == ["a", "e"]
    assert counts.counts == LoadCounts(rows=5, repeated=2, conflicting=1)
    assert [p.id for p in DatasetPrompts(path, limit=1).load()] == ["a"]


@pytest.mark.parametrize("question", ["What is $\\boxed{x}$ if\n\n$x = 2$?", "Solve for $x$: Answer: $x$.", "步骤。求 $x$"])
@pytest.mark.parametrize(
    ("header", "footer"),
    [
        (HEADER, FOOTER),
        (BOXED_HEADER, FOOTER),
        (HEADER.replace("$Answer", "$ANSWER"), FOOTER[:-1] + ", and you do not need to use a \\boxed command."),
        (BOXED_HEADER.replace(" where", ", where"), FOOTER.replace('after "Answer:"', r'as "Answer: \boxed{...}"')),
        ("Solve the following math problem step by step.\n\n", FOOTER + "\n"),
        ("", "\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("", " Let's think step by step and output the final answer within \\boxed{}."),
        ("", "\n\nPlease output the final answer within \\boxed{}."),
        ("", ""),
    ],
)
def test_header_and_footer_come_off_and_nothing_else(header: str, footer: str, question: str) -> None:
    assert bare_question(header + question + footer) == question
    assert bare_question(question) == question


@pytest.mark.parametrize("name", ["dapo_schema_sample", "dapo_schema_aime2024"])
def test_real_questions_are_bared(name: str) -> None:
    """``raw_problem``, where a row has it, is the question without header and footer."""
    path = shared(name)
    stripped = DatasetPrompts(str(path), strip_instructions=True).load()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for problem, row in zip(stripped, rows, strict=True):
        (turn,) = problem.messages
        written = row["prompt"][0]["content"]
        assert HEADER + turn["content"] + FOOTER == written
        assert turn["content"] == row["extra_info"].get("raw_problem", turn["content"]).strip()


REAL = {
    "aime2024": 30,
    "aime2025": 30,
    "aime2026": 30,
    "aime_1983_2023": 975,
    "gsm8k_train": 7473,
    "gsm8k_test": 1319,
    "math_train": 7455,
    "math500": 500,
    "dapo_schema_sample": 49,
    "dapo_schema_aime2024": 30,
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(name: str, pool: VerifierPool) -> None:
    rows = BadRows()
    problems = DatasetPrompts(str(shared(name))).load(rows)
    assert len({p.id for p in problems}) == len(problems) == REAL[name]
    assert rows.counts == LoadCounts(rows=REAL[name])
    if len(problems) <= 50:  # tests/test_verifiers.py judges the others
        assert check_problems(problems, pool) == problems


# --- reasoning-gym -----------------------------------------------------------------------------------------------------------


def test_reasoning_gym_split_is_disjoint_complete_and_repeatable() -> None:
    pytest.importorskip("reasoning_gym")

    def load(split: str, seed: int, size: int = 1500) -> list[Problem]:
        return ReasoningGymPrompts("basic_arithmetic", size, seed, ONE_DIGIT_SUMS, heldout_share=0.25, split=split).load()  # pyright: ignore[reportArgumentType]

    train, heldout = load("train", seed=1), load("heldout", seed=2)
    questions = [p.messages[0]["content"] for p in train + heldout]
    everything = ReasoningGymPrompts("basic_arithmetic", 1500, 3, ONE_DIGIT_SUMS).load()
    assert len(set(questions)) == len(questions)
    assert set(questions) == {p.messages[0]["content"] for p in everything}
    assert 0.1 * len(questions) < len(heldout) < 0.4 * len(questions)
    assert load("train", seed=1) == train
    rows = BadRows()
    ReasoningGymPrompts("basic_arithmetic", 1500, 1, ONE_DIGIT_SUMS, heldout_share=0.25).load(rows)
    assert rows.repeated > 0
    assert rows.counts == LoadCounts(rows=len(train) + rows.repeated, repeated=rows.repeated)
    assert {p.id for p in load("train", seed=9, size=50)} <= {p.id for p in train}
    check_problems(train + heldout, ReasoningGym())
    code = (
        "from cppo_lightning.prompts import ReasoningGymPrompts as R\n"
        f"print([p.id for p in R('basic_arithmetic', 1500, 2, {ONE_DIGIT_SUMS}, heldout_share=0.25, split='heldout').load()])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.splitlines()[-1] == str([p.id for p in heldout])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "basic_arithmetik"}, "has no task 'basic_arithmetik'; near: basic_arithmetic"),
        ({"name": "countdown"}, "'countdown' executes the answer as Python"),
        ({"name": "basic_arithmetic", "params": {"max_digit": 1}}, "params .* do not suit 'basic_arithmetic': .*max_digit"),
        ({"name": "basic_arithmetic", "params": {"max_digits": 0}}, "do not suit"),
        ({"name": "basic_arithmetic", "params": {"seed": 1}}, r"params must not contain \['seed'\]"),
        ({"name": "basic_arithmetic", "size": 0}, "size must be at least 1, got 0"),
        ({"name": "basic_arithmetic", "limit": 0}, "limit must be at least 1"),
        ({"name": "basic_arithmetic", "heldout_share": 1.0}, r"heldout_share must be in \[0, 1\), got 1.0"),
        ({"name": "basic_arithmetic", "split": "test"}, "split must be 'train' or 'heldout', got 'test'"),
        ({"name": "basic_arithmetic", "split": "heldout"}, "empty while heldout_share is 0"),
        (
            {"name": "basic_arithmetic", "size": 1, "heldout_share": 1e-9, "split": "heldout"},
            "none of the 1 distinct questions",
        ),
    ],
)
def test_bad_reasoning_gym_settings(settings: dict, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=message):
        ReasoningGymPrompts(**settings).load()


def test_without_reasoning_gym_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'cppo-lightning\[tasks\]'"):
        ReasoningGymPrompts("basic_arithmetic").load()
