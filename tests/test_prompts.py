"""Prompt sources and templates: what is loaded, what is refused and where, and the exact tokens that the model sees."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cppo_lightning.errors import ConfigError
from cppo_lightning.rollout.prompts import DatasetPrompts, PromptTemplate, ReasoningGymPrompts, check_problems
from cppo_lightning.verifiers import MathAnswer, Problem, ReasoningGym

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
GOOD = {"id": "a", "problem": "1 + 1 = ?", "answer": "2"}


def write(path: Path, *rows: object) -> str:
    """A JSON Lines file; text rows are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_formats_give_the_same_problems(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD, {"id": "b", "problem": "2 + 3 = ?", "answer": "5"}]
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


def test_columns_limit_and_number_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *({"question": f"{i} + 1?", "result": i + 1} for i in range(5)))
    problems = DatasetPrompts(path, problem_key="question", answer_key="result", limit=3).load()
    assert [(p.id, p.answer) for p in problems] == [("q-1", "1"), ("q-2", "2"), ("q-3", "3")]


def test_gsm8k_layout(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"question": "?", "answer": "He has 2 * 3 = <<2*3=6>>6 apples.\n#### 1,006"})
    assert DatasetPrompts(path, problem_key="question").load()[0].answer == "1,006"


def test_dapo_layout(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        problems = DatasetPrompts(str(HERE / "data" / "dapo_layout.jsonl")).load()
    assert [(p.id, p.answer) for p in problems] == [("made-1", "51"), ("made-2", "1024"), ("made-4", "-5")]
    assert problems[0].messages[0]["role"] == "user"
    assert "What is 17 times 3?" in problems[0].messages[0]["content"]
    assert "7 rows, 4 distinct prompts; dropped 3 repeated rows and 1 prompts with conflicting answers" in caplog.text


@pytest.mark.parametrize(
    ("name", "rows"), [("dapo_schema_sample", 49), ("dapo_schema_aime2024", 30), ("aime2025", 30), ("math500", 500)]
)
def test_real_data(name: str, rows: int) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    problems = DatasetPrompts(str(path)).load()
    assert len({p.id for p in problems}) == len(problems) == rows
    check_problems(problems, MathAnswer())


BAD_ROWS = [
    ({"id": "b", "answer": "2"}, "no problem: 'problem' must be a text, got columns"),
    ({"id": "b", "problem": "  ", "answer": "2"}, "no problem: 'problem' must be a text, got '  '"),
    ({"id": "b", "problem": 7, "answer": "2"}, "no problem: 'problem' must be a text, got 7"),
    ({"id": "b", "problem": "?"}, "no answer: 'answer' must be a text or number, got columns"),
    ({"id": "b", "problem": "?", "answer": ""}, "no answer"),
    ({"id": "b", "problem": "?", "answer": None}, "no answer: 'answer' must be a text or number, got None"),
    ({"id": "b", "problem": "?", "answer": True}, "no answer"),
    ({"id": "b", "problem": "?", "answer": ["2"]}, r"no answer: 'answer' must be a text or number, got \['2'\]"),
    ('{"problem": "?", "answer": NaN}', "no answer"),
    ({"id": 1.5, "problem": "?", "answer": "2"}, "the id 'id' must be a text or an integer, got 1.5"),
    ({"id": "a", "problem": "?", "answer": "2"}, "the id 'a' was used before, at .*bad.jsonl:2"),
    ('{"problem": "?", "answer": "2"', "not valid JSON: Expecting ',' delimiter"),
    ("[1, 2]", "must be a JSON object, got list"),
    ("[" * 100_000, "nested too deep|not valid JSON"),
    ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "2"}}, "'prompt' must be a list of messages"),
    ({"prompt": [], "reward_model": {"ground_truth": "2"}}, "last message of 'prompt' must be a text"),
    (
        {"prompt": [{"role": "user", "content": "?"}], "reward_model": None},
        "'reward_model.ground_truth' must be a text or number",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    """The bad row is on line 5; an empty line comes first and another before it."""
    path = write(tmp_path / "bad.jsonl", "", GOOD, GOOD | {"id": "c"}, "", row)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl:5: (?s:.)*{message}"):
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
        ("items.json", '[{"problem": "?", "answer": "1"}, 3]', r"items\.json, row 2: must be a JSON object, got int"),
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


def test_answers_that_cannot_be_judged_stop_the_run(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "b", "answer": r"\frac{1}{2"}, GOOD | {"id": "c", "answer": "}"}]
    problems = DatasetPrompts(write(tmp_path / "odd.jsonl", *rows)).load()
    with pytest.raises(ConfigError, match=r"problem 'b' \(.*odd\.jsonl:2\) cannot be judged by MathAnswer: .*braces.*2 of 3"):
        check_problems(problems, MathAnswer())
    check_problems(problems[:1], MathAnswer())


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
    assert {p.id for p in load("train", seed=9, size=50)} <= {p.id for p in train}
    check_problems(train + heldout, ReasoningGym())
    code = (
        "from cppo_lightning.rollout.prompts import ReasoningGymPrompts as R\n"
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


# --- templates ---------------------------------------------------------------------------------------------------------------


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, and <s>, </s>."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256, "</s>": 257}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}{% if quick is defined %}quick={{ quick }}{% endif %}"
)
ASKED = Problem("p", ({"role": "system", "content": "Old."}, {"role": "user", "content": "What is {{ 1 + 1 }}?"}), "2", "here")


def test_chat_template_gives_exact_tokens() -> None:
    """The problem's own braces stay text; the system turn is replaced; the user turn is dressed."""
    tokenizer = byte_tokenizer(CHAT)
    template = PromptTemplate(system="New.", text="{{ problem }} Only\nthe number.\n", chat_template_kwargs={"quick": "yes"})
    ids = template.encode(tokenizer, ASKED)
    assert tokenizer.decode(ids) == (
        "<s>system\nNew.</s><s>user\nWhat is {{ 1 + 1 }}? Only\nthe number.\n</s><s>assistant\nquick=yes"
    )
    assert isinstance(ids, list)
    assert all(type(i) is int for i in ids)
    kept = tokenizer.decode(PromptTemplate().encode(tokenizer, ASKED))
    assert kept == "<s>system\nOld.</s><s>user\nWhat is {{ 1 + 1 }}?</s><s>assistant\n"


def test_plain_prompt_for_base_models() -> None:
    tokenizer = byte_tokenizer()
    plain = PromptTemplate(chat=False, text="Question: {{ problem }}\nAnswer:")
    assert tokenizer.decode(plain.encode(tokenizer, ASKED)) == "Old.\n\nQuestion: What is {{ 1 + 1 }}?\nAnswer:"


def test_a_closing_token_is_taken_off_a_plain_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    ids = PromptTemplate(chat=False).encode(tokenizer, Problem("p", ({"role": "user", "content": "Hi"},), "2"))
    assert tokenizer.decode(ids) == "<s>Hi"


def test_chat_of_the_small_model(tiny_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    problem = Problem("p", ({"role": "user", "content": "What is 1 + 1?"},), "2")
    ids = PromptTemplate().encode(tokenizer, problem)
    written = tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == written
    assert "What is 1 + 1?" in written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "{{ problem"}, "not valid Jinja"),
        ({"text": "no variable"}, "must use the variable 'problem' and no other, uses \\[\\]"),
        ({"text": "{{ problem }} {{ answer }}"}, "uses \\['answer', 'problem'\\]"),
        ({"chat_template_kwargs": {"tokenize": False}}, "must not set \\['tokenize'\\]"),
    ],
)
def test_bad_templates(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(**settings)


def test_templates_that_do_not_fit_the_tokenizer_or_problem() -> None:
    with pytest.raises(ConfigError, match=r"has no chat template.*set template.chat: false"):
        PromptTemplate().encode(byte_tokenizer(), ASKED)
    strict = byte_tokenizer("{{ raise_exception('no system turn, please') }}")
    with pytest.raises(ConfigError, match=r"refuses problem 'p' with roles \['system', 'user'\]: no system turn, please"):
        PromptTemplate().encode(strict, ASKED)
    with pytest.raises(ConfigError, match="last message must have the role 'user'"):
        PromptTemplate().encode(byte_tokenizer(CHAT), Problem("p", ({"role": "assistant", "content": "x"},), "2"))


@pytest.mark.parametrize("attack", ["{{ problem.__class__.__mro__ }}", "{{ problem.__init__.__globals__ }}"])
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be applied to problem 'p'.*unsafe"):
        PromptTemplate(text=attack).encode(byte_tokenizer(CHAT), ASKED)
