"""The other verifiers, what they are made of, and that none of them executes an answer."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from cppo_lightning.cli import main
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import ReasoningGymPrompts
from cppo_lightning.verifiers import (
    ByDataset,
    Format,
    MathAnswer,
    Outcome,
    Problem,
    ReasoningGym,
    Verdict,
    Verifier,
    VerifierPool,
    WeightedSum,
    reasoning_gym,
)
from cppo_lightning.verifiers.reasoning_gym import EVALUATES_ANSWERS

CONFIGS = Path(__file__).parents[1] / "configs"


def problem(answer: str, dataset: str = "") -> Problem:
    return Problem("p", ({"role": "user", "content": "?"},), answer, dataset=dataset)


# --- nothing that a model writes is executed ---------------------------------------------------------------------------------

# Records every text that Python compiles while a verifier runs.  `qq7` marks what came from the response.
AUDIT = """
import sys
from cppo_lightning.verifiers import MathAnswer, Problem
compiled = []
def hook(event, arguments):
    if event == "compile" and isinstance(arguments[0], str | bytes):
        text = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode("utf-8", "replace")
        compiled.append(text)
"""


def run_audited(code: str) -> list[str]:
    """Runs ``code`` after ``AUDIT`` in a new interpreter and returns the lines that it prints."""
    done = subprocess.run([sys.executable, "-c", AUDIT + code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_math_answer_compiles_nothing_of_an_answer_but_numbers() -> None:
    """SymPy itself compiles fixed texts and, from an answer, the digits of its numbers."""
    hostile = [
        "__import__('qq7')",
        "qq7()",
        "x_{qq7(3)}",
        r"\text{qq7()}",
        r"\operatorname{qq7}(3)",
        "f(qq7)",
        "90271qq7",
        "2,qq7",
    ]
    hostile += ["90271", "90271.5e0", "0x90271", "90271_0", "[qq7 for _ in (1,)]", "lambda: qq7", "qq7=1", r"\sqrt{90271}"]
    lines = run_audited(
        f"""
verifier = MathAnswer()
verifier.prepare()
sys.addaudithook(hook)
for answer in {hostile!r}:
    for gold in ("\\\\sqrt{{2}}", "5", "qq", "1,2"):
        verifier(Problem("p", (), gold), "\\\\boxed{{" + answer + "}}")
print(sorted({{"".join(text.split()) for text in compiled if "qq7" in text or "90271" in text}}))
"""
    )
    assert lines[-1] == str(["Float('90271.5')", "Integer(90271)"])


@pytest.mark.slow
def test_the_refused_reasoning_gym_tasks_are_exactly_those_that_execute_answers() -> None:
    pytest.importorskip("reasoning_gym")
    lines = run_audited(
        """
import reasoning_gym
from reasoning_gym.factory import DATASETS
sys.addaudithook(hook)
for name in sorted(set(DATASETS) - {"composite"}):
    entry = reasoning_gym.create_dataset(name, size=1, seed=0)[0]
    score, gold = reasoning_gym.get_score_answer_fn(name), entry["answer"] or ""
    compiled.clear()
    for answer in ("qq7", "[qq7]", '[["qq7"]]', gold + "+qq7", gold + " qq7", "qq7 " + gold, '"qq7"', "qq7=1"):
        try:
            score(answer, entry)
        except Exception as error:
            print(name, error, file=sys.stderr)
    if any("qq7" in text for text in compiled):
        print("\\nexecutes", name)
"""
    )
    assert {line.split()[1] for line in lines if line.startswith("executes ")} == EVALUATES_ANSWERS


def test_another_reasoning_gym_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym, "version", lambda name: "0.1.26")
    reasoning_gym._scorer.cache_clear()
    message = r"reasoning-gym 0\.1\.26 is installed, .* known of 0\.1\.25 alone; .*pip install 'reasoning-gym==0\.1\.25'"
    with pytest.raises(ConfigError, match=message):
        ReasoningGymPrompts("basic_arithmetic").load()
    with pytest.raises(ConfigError, match=message):
        ReasoningGym().prepare()


# --- reasoning-gym -----------------------------------------------------------------------------------------------------------


def task_problem(name: str, **params: object) -> Problem:
    entry = pytest.importorskip("reasoning_gym").create_dataset(name, size=1, seed=0, **params)[0]
    return Problem("r", (), str(entry["answer"]), metadata={"task": name, "entry": entry})


def test_reasoning_gym_scores() -> None:
    verifier, asked = ReasoningGym(), task_problem("basic_arithmetic")
    gold = asked.answer
    for response in (
        gold,
        f" {gold}\n",
        f"It is <answer> {gold} </answer>.",
        f"<think>0</think>{gold}",
        f"<answer>1</answer><answer>{gold}",
    ):
        assert verifier(asked, response).outcome is Outcome.CORRECT, response
    near = verifier(asked, f"x {gold}")
    assert (near.outcome, near.reward) == (Outcome.WRONG, 0.0)
    partial = ReasoningGym(partial_credit=True)(asked, f"x {gold}")
    assert partial.outcome is Outcome.WRONG
    assert 0 < partial.reward < 1
    assert verifier(asked, "  ").outcome is Outcome.UNPARSEABLE
    assert verifier(asked, f"{int(gold) + 1}").outcome is Outcome.WRONG


def test_reasoning_gym_check() -> None:
    asked = task_problem("basic_arithmetic")
    ReasoningGym().check(asked)
    broken = Problem("r", (), "7", metadata={"task": "basic_arithmetic", "entry": dict(asked.metadata["entry"], answer="")})
    with pytest.raises(ValueError, match="scores its own answer ''"):
        ReasoningGym().check(broken)
    with pytest.raises(ValueError, match="no 'task'"):
        ReasoningGym().check(problem("7"))
    with pytest.raises(ConfigError, match="'countdown' executes the answer"):
        ReasoningGym()(Problem("r", (), "7", metadata={"task": "countdown", "entry": {}}), "7")


# --- format, sums, and one verifier for each data set ------------------------------------------------------------------------

TAGGED = Format(r"\A<think>.*</think>")
SUMMED = WeightedSum({"answer": MathAnswer(), "form": TAGGED}, {"answer": 1.0, "form": 0.25})


class Raises(Verifier):
    """Cannot judge, check or prepare anything."""

    def __call__(self, problem: Problem, response: str) -> Verdict:
        raise OverflowError("too much")

    def check(self, problem: Problem) -> None:
        raise ValueError("never right")

    def prepare(self) -> None:
        raise ImportError("not there")


def test_format() -> None:
    assert TAGGED(problem("5"), "<think>a\nb</think>c") == Verdict(Outcome.CORRECT, 1.0, "<think>a\nb</think>")
    assert TAGGED(problem("5"), " <think></think>") == Verdict(Outcome.WRONG, 0.0)
    with pytest.raises(ConfigError, match=r"Format.pattern '\(' is not a regular expression"):
        Format("(")


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with VerifierPool(Format(r"\A(a+)+\Z"), workers=1, deadline=1.0) as pool:
        verdicts = pool.judge([(problem("5"), "a" * 60 + "b"), (problem("5"), "aaa")])
    assert [verdict.outcome for verdict in verdicts] == [Outcome.TIMED_OUT, Outcome.CORRECT]


@pytest.mark.parametrize(
    ("response", "outcome", "extracted", "reward", "parts"),
    [
        (r"<think></think>\boxed{5}", Outcome.CORRECT, "5", 1.25, {"answer": 1.0, "form": 1.0}),
        (r"\boxed{5}", Outcome.CORRECT, "5", 1.0, {"answer": 1.0, "form": 0.0}),
        (r"<think></think>\boxed{6}", Outcome.WRONG, "6", 0.25, {"answer": 0.0, "form": 1.0}),
        ("<think></think>", Outcome.UNPARSEABLE, None, 0.25, {"answer": 0.0, "form": 1.0}),
        ("", Outcome.UNPARSEABLE, None, 0.0, {"answer": 0.0, "form": 0.0}),
    ],
)
def test_weighted_sum(response: str, outcome: Outcome, extracted: str | None, reward: float, parts: dict[str, float]) -> None:
    assert SUMMED(problem("5"), response) == Verdict(outcome, reward, extracted, parts=parts)


def test_weighted_sum_checks_by_its_first_and_fails_with_any() -> None:
    SUMMED.check(problem("5"))
    WeightedSum({"answer": MathAnswer(), "other": Raises()}, {"answer": 1, "other": 1}).check(problem("5"))
    with pytest.raises(ValueError, match="unmatched braces"):
        SUMMED.check(problem("{"))
    broken = WeightedSum({"answer": MathAnswer(), "other": Raises()}, {"answer": 1, "other": 0})
    with pytest.raises(OverflowError):
        broken(problem("5"), r"\boxed{5}")
    with pytest.raises(ImportError):
        broken.prepare()


@pytest.mark.parametrize(
    ("verifiers", "weights", "message"),
    [
        ({}, {}, "WeightedSum.verifiers is empty"),
        ({"a": TAGGED}, {"b": 1.0}, r"WeightedSum.weights has the names \['b'\] and WeightedSum.verifiers \['a'\]"),
        ({"a": TAGGED}, {"a": float("nan")}, r"WeightedSum.weights\['a'\] must be a finite number, got nan"),
    ],
)
def test_weights_that_do_not_fit(verifiers: dict[str, Verifier], weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedSum(verifiers, weights)


def test_by_dataset() -> None:
    verifier = ByDataset({"sums": MathAnswer(), "forms": TAGGED})
    verifier.prepare()
    assert verifier(problem("5", "sums"), r"\boxed{5}").outcome is Outcome.CORRECT
    assert verifier(problem("5", "forms"), r"\boxed{5}").outcome is Outcome.WRONG
    verifier.check(problem("{", "forms"))
    with pytest.raises(ValueError, match="unmatched braces"):
        verifier.check(problem("{", "sums"))
    for call in (lambda: verifier.check(problem("5", "other")), lambda: verifier(problem("5"), "")):
        with pytest.raises(ValueError, match=r"no verifier for the data set .*ByDataset has sums, forms"):
            call()
    with_default = ByDataset({"sums": MathAnswer()}, default=TAGGED)
    with_default.check(problem("{", "heldout"))
    assert with_default(problem("5", "heldout"), "<think></think>5").outcome is Outcome.CORRECT
    assert with_default(problem("5", "sums"), "<think></think>5").outcome is Outcome.UNPARSEABLE
    with pytest.raises(ConfigError, match=r"ByDataset\.verifiers is empty"):
        ByDataset({})
    with pytest.raises(ImportError):
        ByDataset({"a": Raises()}).prepare()


NESTED = """
data:
  verifier:
    class_path: cppo_lightning.verifiers.ByDataset
    init_args:
      verifiers:
        forms: {class_path: cppo_lightning.verifiers.Format, init_args: {pattern: "a+"}}
        sums:
          class_path: cppo_lightning.verifiers.WeightedSum
          init_args:
            weights: {answer: 1, form: 0.25}
            verifiers:
              answer: {class_path: cppo_lightning.verifiers.MathAnswer, init_args: {bare: true}}
              form: {class_path: cppo_lightning.verifiers.Format, init_args: {pattern: "</think>"}}
"""


@pytest.fixture
def own_sys_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main`` puts the working folder on it."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("own_sys_path")
def test_verifiers_in_verifiers_from_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line takes them, its own output says the same again, and what it says builds them."""
    (tmp_path / "nested.yaml").write_text(NESTED)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(CONFIGS / "debug.yaml"), "--config", str(tmp_path / "nested.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["verifier"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--verifier", type=Verifier)
    summed = WeightedSum({"answer": MathAnswer(bare=True), "form": Format("</think>")}, {"answer": 1, "form": 0.25})
    built = parser.instantiate(parser.parse_object({"verifier": printed})).verifier
    assert built == ByDataset({"forms": Format("a+"), "sums": summed})
    assert list(built.verifiers["sums"].verifiers) == ["answer", "form"]


@pytest.mark.usefixtures("own_sys_path")
def test_weights_are_checked_before_a_model_is_loaded(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nested.yaml").write_text(NESTED.replace("answer: 1,", "anwser: 1,"))
    configs = ["--config", str(CONFIGS / "debug.yaml"), "--config", str(tmp_path / "nested.yaml")]
    with pytest.raises(SystemExit) as end:
        main(["fit", *configs, "--model.policy.path", str(tiny_model_path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "WeightedSum.weights has the names ['anwser', 'form']" in error
    assert "Traceback" not in error


def test_verifiers_travel_and_are_light() -> None:
    nested = ByDataset({"a": SUMMED, "b": ReasoningGym(partial_credit=True)})
    for verifier in (MathAnswer(bare=True), ReasoningGym(partial_credit=True), nested):
        assert pickle.loads(pickle.dumps(verifier)) == verifier
    heavy = "[m for m in ('torch', 'sympy', 'reasoning_gym', 'transformers') if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, cppo_lightning.verifiers; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
