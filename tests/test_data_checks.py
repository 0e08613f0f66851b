"""Checks of whole data sets before training: overlaps, fingerprints, lengths, the report; then fits on files of each layout."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from cppo_lightning.callbacks import DataReport, EvalAccuracy
from cppo_lightning.cli import main
from cppo_lightning.datamodule import Evaluation
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.contamination import GRAM, MIN_GRAMS, SHARE, Overlap, TrainingTexts, tokens
from cppo_lightning.prompts.fingerprint import fingerprint
from cppo_lightning.rollout import (
    BadRows,
    DatasetPrompts,
    PromptSource,
    PromptTemplate,
    Sampler,
    TransformersEngine,
    VLLMEngine,
    problem_sets,
)
from cppo_lightning.rollout.problem_sets import DataRules, ProblemSets, context_length
from cppo_lightning.verifiers import Format, MathAnswer, Problem, VerifierPool
from tests.conftest import REPOSITORY
from tests.test_fit import make_data, make_module, make_trainer

DATA = REPOSITORY.parent / "shared" / "data"


def ask(text: str, name: str = "p", answer: str = "1", **more: Any) -> Problem:
    return Problem(name, ({"role": "user", "content": text},), answer, **more)


@dataclass(frozen=True)
class Given(PromptSource):
    """These problems, and what is said to have become of the rows."""

    problems: tuple[Problem, ...]

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        return list(self.problems)


# --- overlaps ----------------------------------------------------------------------------------------------------------------

CANDLES = (
    "A candle 119 centimeters tall burns down at a constant rate. It takes 10 seconds to burn the first centimeter, 20 seconds "
    "for the second and 30 seconds for the third. How tall is it after half of the time that it burns in all?"
)


def overlap(training: str, evaluation: str) -> str | None:
    found = TrainingTexts([ask(training, "t")]).overlaps([ask(evaluation, "e")])
    assert len(found) <= 1
    return None if not found else "exact" if found[0].exact else "near"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Find $x$ if $2x = 6$.", "find $ x $ if  \\(2x=6\\)", "exact"),
        ("What is \\dfrac{1}{2} of $10{,}000$?", "What is $\\frac{1}{2}$ of 10000?", "exact"),
        ("Let $x^{}_{}$ be \\left( 3 \\right).", "Let $x$ be (3).", "exact"),
        (CANDLES, CANDLES + "[asy] draw((0,0)--(1,119)); [/asy]", "exact"),
        ("Find $x$. [asy] draw((0,0)--(1,1)); [/asy]", "Find $x$. [asy] draw((0,0)--(1,2)); [/asy]", None),
        (
            "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
            "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 2 + 3?\n\n"
            'Remember to put your answer on its own line after "Answer:".',
            "What is 2 + 3?",
            "exact",
        ),
        ("Calculate 3 + 4.", "Calculate 3 - 4.", None),
        ("Calculate 3 + 4.", "Calculate 4 + 3.", None),
        ("How many is 3.5?", "How many is 35?", None),
        (CANDLES, CANDLES.replace("seconds", "s"), "near"),
        (CANDLES, CANDLES + " Give it in centimeters, and write the answer as $10h$.", "near"),
        (CANDLES, CANDLES.replace("119", "121"), None),
        (CANDLES, CANDLES.replace("20 seconds", "10 seconds"), None),
        ("", "?", "exact"),
    ],
)
def test_what_is_the_same_problem(one: str, other: str, expected: str | None) -> None:
    assert overlap(one, other) == overlap(other, one) == expected


def test_templates_without_numbers_are_reported_and_said_to_be() -> None:
    """The documented limit: without a number nothing tells a template from a problem."""
    question = "Determine the number of ways to arrange the letters of the word {} in a row."
    assert overlap(question.format("TOOT"), question.format("ELLIPSE")) == "near"


def brute_force(training: list[Problem], evaluation: list[Problem]) -> set[Overlap]:
    """The definition, pair by pair, on words."""
    found = set()
    for one in training:
        for other in evaluation:
            texts = [tokens(problem.messages[-1]["content"]) for problem in (one, other)]
            grams = [{tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)} for text in texts]
            numbers = [sorted(word for word in text if word[0].isdigit()) for text in texts]
            shorter, shared = min(map(len, grams)), len(grams[0] & grams[1])
            few, many = sorted(numbers, key=len)
            within = all(few.count(number) <= many.count(number) for number in few) and bool(few) == bool(many)
            if texts[0] == texts[1]:
                found.add(Overlap(one.id, other.id, 1.0, True))
            elif shorter >= MIN_GRAMS and shared / shorter >= SHARE and within:
                found.add(Overlap(one.id, other.id, shared / shorter, False))
    return found


def test_overlaps_are_those_of_the_definition() -> None:
    rng = random.Random(0)
    words = [*"abcdefgh", *"1234"]
    bases = [[rng.choice(words) for _ in range(rng.randint(1, 30))] for _ in range(12)]

    def variant(number: int, side: str) -> Problem:
        text = list(rng.choice(bases))
        for _ in range(rng.randint(0, 3)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 1)] = [rng.choice(words)]
        return ask(" ".join(text), f"{side}{number}")

    training, evaluation = ([variant(i, side) for i in range(120)] for side in "te")
    found = TrainingTexts(training).overlaps(evaluation)
    expected = brute_force(training, evaluation)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert min(sum(o.exact for o in found), sum(not o.exact for o in found)) > 50, "too few to test anything"
    assert [(o.exact, o.share) for o in found] == sorted(((o.exact, o.share) for o in found), reverse=True)


def real(name: str) -> list[Problem]:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    return DatasetPrompts(str(path)).load()


@pytest.mark.parametrize(
    ("training", "evaluation", "least", "most"),
    [
        ("dapo_schema_aime2024", "aime2024", 30, 30),  # the same problems, one of them in other words
        ("gsm8k_train", "gsm8k_test", 0, 0),  # three pairs are alike but for the numbers
        ("aime_1983_2023", "aime2025", 0, 0),
        ("math_train", "aime_1983_2023", 450, 460),  # MATH took them in
        ("math_train", "math500", 0, 30),
    ],
)
def test_overlaps_of_real_sets(training: str, evaluation: str, least: int, most: int) -> None:
    found = TrainingTexts(real(training)).overlaps(real(evaluation))
    assert least <= len(found) <= most


def test_near_matches_of_math_and_aime_have_the_same_answer_where_it_is_an_integer_in_both() -> None:
    """Answers play no part in finding pairs.  What is left are typing errors, and remainders that one of the two asks for."""
    training, evaluation = ({p.id: p.answer for p in real(name)} for name in ("math_train", "aime_1983_2023"))
    pairs = TrainingTexts(real("math_train")).overlaps(real("aime_1983_2023"))
    answers = [(training[o.training], evaluation[o.evaluation]) for o in pairs]
    integers = [(int(a), int(b)) for a, b in answers if re.fullmatch(r"-?\d+", a) and b.isdigit()]
    assert len(integers) > 400
    assert sum(abs(a) % 1000 != b for a, b in integers) <= 0.01 * len(integers)


# --- fingerprints ------------------------------------------------------------------------------------------------------------

PROBLEMS = [ask("What is 1 + 1?", "a", "2", metadata={"task": "sum", "entry": {"x": 1}}), ask("What is 2 + 1?", "b", "3")]
CHANGES: dict[str, Any] = {
    "order": PROBLEMS[::-1],
    "fewer": PROBLEMS[:1],
    "id": [replace(PROBLEMS[0], id="A"), PROBLEMS[1]],
    "answer": [replace(PROBLEMS[0], answer="3"), PROBLEMS[1]],
    "text": [replace(PROBLEMS[0], messages=({"role": "user", "content": "What is 1 + 1 ?"},)), PROBLEMS[1]],
    "role": [replace(PROBLEMS[0], messages=({"role": "system", "content": "What is 1 + 1?"},)), PROBLEMS[1]],
    "set": [replace(PROBLEMS[0], dataset="sums"), PROBLEMS[1]],
    "metadata": [replace(PROBLEMS[0], metadata={"task": "sum", "entry": {"x": 2}}), PROBLEMS[1]],
    "moved between fields": [replace(PROBLEMS[0], id="a2", answer=""), PROBLEMS[1]],
}


def test_a_fingerprint_is_of_everything_that_is_trained_on() -> None:
    plain = PromptTemplate()
    prints = {name: fingerprint(problems, plain) for name, problems in CHANGES.items()}
    prints["as it is"] = fingerprint(PROBLEMS, plain)
    prints["template"] = fingerprint(PROBLEMS, PromptTemplate(text="{{ problem }} "))
    prints["template arguments"] = fingerprint(PROBLEMS, PromptTemplate(chat_template_kwargs={"enable_thinking": False}))
    prints["shares"] = fingerprint(PROBLEMS, plain, {"sums": 1.0})
    prints["other shares"] = fingerprint(PROBLEMS, plain, {"sums": 2.0})
    assert len(set(prints.values())) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in prints.values())


def test_a_fingerprint_is_not_of_places_or_the_order_of_keys() -> None:
    moved = replace(PROBLEMS[0], source="elsewhere.jsonl:7", metadata={"entry": {"x": 1}, "task": "sum"})
    moved = replace(moved, messages=({"content": "What is 1 + 1?", "role": "user"},))
    assert fingerprint([moved, PROBLEMS[1]], PromptTemplate()) == fingerprint(PROBLEMS, PromptTemplate())


SCRIPT = """
from fractions import Fraction
from cppo_lightning.rollout import PromptTemplate
from cppo_lightning.prompts.fingerprint import fingerprint
from cppo_lightning.verifiers import Problem

class Plain:
    def __init__(self):
        self.words = {"a", "b", "c"}

metadata = {"words": {str(i) for i in range(50)}, "half": Fraction(1, 2), "object": Plain(), 3: (1, None, 2.5)}
found = fingerprint([Problem("a", (), "1", metadata=metadata)], PromptTemplate())
"""


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """Strings hash differently in each, which shows in the order of sets; objects lie elsewhere, which shows in their names."""
    here: dict[str, Any] = {}
    exec(SCRIPT, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", f"{SCRIPT}print(found)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}, cwd=REPOSITORY)
    assert done.stdout.strip() == here["found"]


# --- sets --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler(tiny_model_path: Path) -> Iterator[Sampler]:
    """The tiny model has one token per byte."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    with VerifierPool(Format("[a-m]"), workers=1) as pool:
        yield Sampler(TransformersEngine(), tokenizer, PromptTemplate(chat=False), pool)


def lengths(*tokens: int) -> Given:
    return Given(tuple(ask("a" * length, f"p{length}") for length in tokens))


def test_prompts_that_are_too_long_are_dropped_and_counted(sampler: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sets = ProblemSets(sampler, DataRules(), context=30)
        loaded = sets.load_training(lengths(5, 20, 21, 19), max_tokens=10)
    assert [problem.id for problem in loaded.problems] == ["p5", "p20", "p19"]
    assert loaded.too_long == 1
    assert caplog.messages == ["training: 3 problems; left out: 1 with prompts of more than 20 tokens"]
    tighter = ProblemSets(sampler, DataRules(max_prompt_tokens=19), context=30).load_training(lengths(5, 20, 21, 19), 10)
    assert [problem.id for problem in tighter.problems] == ["p5", "p19"]
    unlimited = ProblemSets(sampler, DataRules(), context=None).load_training(lengths(5, 2000), 10)
    assert (len(unlimited.problems), unlimited.too_long) == (2, 0)
    assert tighter.fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    ("rules", "context", "message"),
    [
        (DataRules(), 14, r"all 2 prompts have more than 4 tokens, the shortest 5; raise data\.max_prompt_tokens"),
        (DataRules(max_prompt_tokens=3), None, "all 2 prompts have more than 3 tokens"),
        (DataRules(max_prompt_tokens=21), 30, r"max_prompt_tokens = 21 with .*max_tokens = 10 exceeds .* 30 .*at most 20"),
        (DataRules(), 10, r"max_tokens = 10 leaves no room for a prompt in the context of 10"),
    ],
)
def test_lengths_that_leave_nothing_are_refused(sampler: Sampler, rules: DataRules, context: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProblemSets(sampler, rules, context).load_training(lengths(5, 7), max_tokens=10)


def test_no_evaluation_problem_is_dropped(sampler: Sampler) -> None:
    sets = ProblemSets(sampler, DataRules(max_prompt_tokens=1), context=30)
    assert len(sets.load_evaluation("held", lengths(5, 20), max_tokens=10).problems) == 2
    with pytest.raises(ConfigError, match=r"problem 'p21' .* evaluation set 'other' has 21 tokens, .*max_tokens to 9"):
        sets.load_evaluation("other", lengths(5, 21), max_tokens=10)


def test_the_shorter_of_the_models_and_the_engines_context_counts(tiny_model_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_path)
    short = VLLMEngine.__new__(VLLMEngine)  # which is set up only where vLLM is installed
    short.max_model_len = 100
    assert context_length(config, TransformersEngine()) == config.max_position_embeddings
    assert context_length(config, short) == 100
    short.max_model_len = 10**6
    assert context_length(config, short) == config.max_position_embeddings
    assert context_length(PretrainedConfig(), TransformersEngine()) is None


TRAINED = Given((ask(CANDLES, "candles"), ask("What is 2 + 3?", "five")))
HELD = Given((ask(CANDLES.replace("seconds", "s"), "h1"), ask("what is 2+3", "h2"), ask("What is 2 + 4?", "h3")))


def test_overlaps_are_found_told_once_and_can_stop_the_run(sampler: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    sets = ProblemSets(sampler, DataRules(), None)
    sets.load_training(TRAINED, 10)
    with caplog.at_level(logging.WARNING):
        first = sets.load_evaluation("held", HELD, 10)
        again = sets.load_evaluation("the same", HELD, 10)
        clean = sets.load_evaluation("clean", lengths(5), 10)
    assert first is again
    assert first.name == "held, the same"
    assert [(o.training, o.evaluation, o.exact) for o in first.overlaps] == [("five", "h2", True), ("candles", "h1", False)]
    assert list(clean.overlaps) == []
    assert caplog.messages == [
        "held: of its 3 problems, 1 match training problems exactly and 1 nearly: 'h2' = 'five', 'h1' ~ 'candles'"
    ]
    with pytest.raises(ConfigError, match="two evaluation sets are called 'held' and have other problems"):
        sets.load_evaluation("held", lengths(5), 10)
    strict = ProblemSets(sampler, DataRules(on_contamination="raise"), None)
    strict.load_training(TRAINED, 10)
    with pytest.raises(ConfigError, match=r"'h2' = 'five'.*take them out of data\.prompts, or set .*on_contamination: report"):
        strict.load_evaluation("held", HELD, 10)


def test_only_one_rank_speaks(sampler: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    sets = ProblemSets(sampler, DataRules(max_prompt_tokens=200), None, speaks=False)
    with caplog.at_level(logging.WARNING):
        sets.load_training(Given((*TRAINED.problems, ask("?" * 201, "long"))), 10)
        sets.load_evaluation("held", HELD, 10)
    assert sets.training is not None
    assert sets.training.too_long == 2
    assert caplog.messages == []


def test_ranks_that_read_other_problems_are_refused(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ProblemSets(sampler, DataRules(), None)
    monkeypatch.setattr(problem_sets, "on_every_rank", lambda mine: [mine, mine])
    found = sets.load_training(TRAINED, 10).fingerprint
    monkeypatch.setattr(problem_sets, "on_every_rank", lambda mine: [mine, mine, "0123"])
    message = f"problems on rank 2 have the fingerprint 0123, those on rank 0 {found}; give every rank the same files"
    with pytest.raises(ConfigError, match=message):
        sets.load_training(TRAINED, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_bad_row": "drop"}, "data.on_bad_row must be raise or skip, got 'drop'"),
        ({"on_contamination": "drop"}, "data.on_contamination must be report or raise, got 'drop'"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens must be at least 1 or null, got 0"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataRules(**settings)


# --- the report, and whole runs ----------------------------------------------------------------------------------------------


def logged(folder: Path) -> EventAccumulator:
    (events,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(events)).Reload()


def scalars(folder: Path, prefix: str) -> dict[str, float]:
    found = logged(folder)
    return {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"] if tag.startswith(prefix)}


def test_the_report(tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tiny_model_path, prompts=TRAINED, max_prompt_tokens=200 + len(CANDLES), verifier=Format("[a-m]"))
    callbacks = [DataReport(), EvalAccuracy({"held": HELD, "a:100:b": lengths(5)}, samples=2, max_tokens=4, at_end=False)]
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    run = make_trainer(tmp_path, callbacks, rollouts=1, logger=logger)
    try:
        run.fit(make_module(tiny_model_path), datamodule=data)
    finally:
        data.close()
    printed = capsys.readouterr().out
    assert re.search(rf"training +0 +0 +0 +0 +0 +2 +{data.fingerprint}", printed)
    assert "held: of its 3 problems, 1 match training problems exactly and 1 nearly: 'h2' = 'five', 'h1' ~ 'candles'" in printed
    assert "a:100:b: none of its 1 problems is in the training set" in printed, "rich makes an emoji of :100: where it may"
    assert re.search(r"^ *a:100:b +0 +0 +0 +0 +0 +1 ", printed, re.MULTILINE)
    text = logged(tmp_path / "run").Tensors("data/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"training | 0 | 0 | 0 | 0 | 0 | 2 | {data.fingerprint}\n" in text
    assert "'h1' ~ 'candles'" in text
    assert scalars(tmp_path, "data/") == {
        **dict.fromkeys(("data/repeated", "data/conflicting", "data/bad", "data/too_long"), 0),
        **dict.fromkeys(("data/problems", "data/contaminated"), 2),
    }
    (pairs,) = json.loads((tmp_path / "run" / "contamination.json").read_text()).values()
    assert [(pair["training"], pair["evaluation"], pair["exact"]) for pair in pairs] == [
        ("five", "h2", True),
        ("candles", "h1", False),
    ]


def test_training_on_what_the_datamodule_evaluates_can_be_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    data = make_data(tiny_model_path, prompts=TRAINED, evaluation=Evaluation(HELD), on_contamination="raise")
    with pytest.raises(ConfigError, match="evaluation: of its 3 problems, 1 match training problems exactly and 1 nearly"):
        make_trainer(tmp_path, []).fit(make_module(tiny_model_path), datamodule=data)
    data.close()


GSM8K = [
    {"question": f"Tom has {i} pens and buys 2. How many are his?", "answer": f"He has {i + 2}.\n#### {i + 2}"}
    for i in range(8)
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve the following math problem step by step.\n\nWhat is {i} plus 2?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i + 2 + (i == 0) * repeat), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"made-{i}"},
    }
    for repeat in range(3)
    for i in range(8)
]
TOO_LONG = {"question": "long " * 100, "answer": "#### 3"}
LAYOUTS: dict[str, tuple[list[dict[str, Any]], dict[str, float]]] = {
    "gsm8k.jsonl": (
        [*GSM8K, {"question": "?"}, TOO_LONG],
        {"problems": 8, "repeated": 0, "conflicting": 0, "bad": 1, "too_long": 1},
    ),
    "gsm8k.parquet": (
        [*GSM8K, {"question": "?", "answer": None}, TOO_LONG],
        {"problems": 8, "repeated": 0, "conflicting": 0, "bad": 1, "too_long": 1},
    ),
    "dapo.parquet": (DAPO, {"problems": 7, "repeated": 16, "conflicting": 1, "bad": 0, "too_long": 0}),
}


@pytest.fixture
def in_tmp(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


def fit_file(name: str, *arguments: str) -> None:
    config = str(REPOSITORY / "configs" / "debug.yaml")
    prompts = ["--data.prompts=DatasetPrompts", f"--data.prompts.path={name}", "--data.prompts.problem_key=question"]
    main(["fit", "--config", config, *prompts, "--trainer.max_epochs=1", "--data.max_prompt_tokens=300", *arguments])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fit_on_a_file_of_each_layout(name: str, in_tmp: Path) -> None:
    rows, expected = LAYOUTS[name]
    write(in_tmp / name, rows)
    fit_file(name, "--data.on_bad_row=skip")
    assert scalars(in_tmp, "data/") == {f"data/{key}": value for key, value in {**expected, "contaminated": 0}.items()}
    assert scalars(in_tmp, "rollout/reward")
    assert scalars(in_tmp, "train/loss")


def test_a_fit_on_a_file_with_a_bad_row_stops_where_skipping_is_not_asked_for(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(in_tmp / "gsm8k.jsonl", LAYOUTS["gsm8k.jsonl"][0])
    with pytest.raises(SystemExit) as end:
        fit_file("gsm8k.jsonl")
    assert end.value.code == 2
    assert re.search(r"^error: .*gsm8k\.jsonl:9: .*answer", capsys.readouterr().err, re.MULTILINE)


def test_answers_that_cannot_be_judged_are_skipped_too(sampler: Sampler) -> None:
    problems = Given((ask("?", "a", "2"), ask("?", "b", r"\frac{1}{2"), ask("?", "c", "3")))
    with VerifierPool(MathAnswer(), workers=1) as pool:
        judged = Sampler(sampler.engine, sampler.tokenizer, sampler.template, pool)
        loaded = ProblemSets(judged, DataRules(on_bad_row="skip"), None).load_training(problems, 10)
        assert [problem.id for problem in loaded.problems] == ["a", "c"]
        assert loaded.counts.bad == 1
        assert "cannot be judged by MathAnswer" in loaded.bad
        with pytest.raises(ConfigError, match=r"problem 'b' .* cannot be judged by MathAnswer"):
            ProblemSets(judged, DataRules(), None).load_training(problems, 10)
