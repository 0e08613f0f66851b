"""Verifiers: what counts as the same answer, compared with exact arithmetic and with real gold answers; nothing is executed."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, ReasoningGym, VerifierPool
from cppo_lightning.verifiers.normalise import last_boxed, read_number
from cppo_lightning.verifiers.reasoning_gym import EVALUATES_ANSWERS

DATA = Path(__file__).parents[2] / "shared" / "data"

# Real dressings of the answer 25.
DRESSED = [
    *(
        r"\boxed{25}",
        r"\boxed{025}",
        r"$\boxed{25}$.",
        r"\[\boxed{25}\]",
        r"\boxed{ {25} }",
        r"\fbox{25}",
        r"\boxed{\boxed{25}}",
    ),
    *(
        "Answer: 25",
        "**Answer:** 25",
        "**Answer: 25**",
        "Answer: **25**",
        "### Final Answer: 25",
        "The answer is: 25",
        "answer:25",
    ),
    *("Answer: $25$", "Answer: \\(25\\)", r"Answer: \[25\]", "Answer: 25.", "Answer: 25.0", "Answer: +25", "Answer: `25`"),
    *(r"Answer: \boxed{25}", "Answer:\n\n25", 'Answer: "25"', "Answer: \uff12\uff15", "Answer: 25\u00b0", "Answer: $25"),
    *(
        "Answer: 25 dollars",
        "Answer: 25 square units",
        "Answer: 25 km/h",
        "Answer: x = 25",
        "Answer: $x=25$",
        r"\boxed{x = 25}",
    ),
    *(
        r"\boxed{\text{25}}",
        r"\boxed{\textbf{25}}",
        r"\boxed{25^\circ}",
        r"\boxed{25\%}",
        r"\boxed{\$25}",
        r"\boxed{25\text{ cm}^2}",
    ),
    *(r"\boxed{25 \, \text{dollars}}", r"\boxed{25\,\mathrm{m/s}}", r"\\boxed{25}", r"an open brace { and \boxed{25}"),
    *("<think>\\boxed{3}</think>\\boxed{25}", "Answer: 24\nno,\nAnswer: 25", r"first \boxed{24}, then \boxed{25}"),
]
# Not the answer 25: other values, sums that are not done, and what only contains 25.
WRONG = [
    *(r"\boxed{20+5}", r"\boxed{5^2}", r"\boxed{\frac{50}{2}}", r"\boxed{\sqrt{625}}", r"\boxed{5\cdot5}", r"\boxed{2**5}"),
    *(
        r"\boxed{\sum_{k=1}^{5}5}",
        r"\boxed{25!}",
        r"\boxed{25i}",
        r"\boxed{25\pi}",
        r"\boxed{25x}",
        "Answer: 25 x",
        r"\boxed{2.5e1}",
    ),
    *(r"\boxed{-25}", "Answer: \u221225", r"\boxed{2 5}", r"\boxed{25,26}", r"\boxed{25 \text{ or } 26}", "Answer: 25 or 26"),
    *(
        "Answer: 25 million",
        r"\boxed{25 \text{ million}}",
        "Answer: 25 factorial",
        "Answer: 25.5",
        "Answer: 25\u00b2",
        "Answer: 0,025",
    ),
    *(
        r"\boxed{x>=25}",
        r"\boxed{x \neq 25}",
        r"\boxed{25_{7}}",
        "Answer: 25\nAnswer: 26",
        r"\boxed{25} no, \boxed{26}",
        "Answer: $Answer",
    ),
]
UNREAD = [
    "25",
    "the sum is 25",
    r"\boxed{25",
    r"\boxed{}",
    "Answer:",
    "",
    "<think>\\boxed{25}",
    "\\boxed{25}</think>",
    r"boxed{25}",
]


def problem(answer: str) -> Problem:
    return Problem("p", ({"role": "user", "content": "?"},), answer)


def outcome(gold: str, response: str) -> Outcome:
    return MathAnswer()(problem(gold), response).outcome


@pytest.mark.parametrize("response", DRESSED)
def test_integer_in_its_dressings(response: str) -> None:
    verdict = MathAnswer()(problem("25"), response)
    assert (verdict.outcome, verdict.reward) == (Outcome.CORRECT, 1.0), verdict


@pytest.mark.parametrize("response", WRONG)
def test_what_is_not_the_integer(response: str) -> None:
    verdict = MathAnswer()(problem("25"), response)
    assert (verdict.outcome, verdict.reward) == (Outcome.WRONG, 0.0), verdict


@pytest.mark.parametrize("response", UNREAD)
def test_no_answer_is_not_a_wrong_answer(response: str) -> None:
    verdict = MathAnswer()(problem("25"), response)
    assert (verdict.outcome, verdict.reward) == (Outcome.UNPARSEABLE, 0.0), verdict


def test_bare_number_only_when_asked_for() -> None:
    bare = MathAnswer(bare=True)
    assert bare(problem("25"), " 25.\n").outcome is Outcome.CORRECT
    assert bare(problem("25"), "24").outcome is Outcome.WRONG
    assert bare(problem("25"), "It is 25").outcome is Outcome.UNPARSEABLE


def dress(value: Fraction, rng: random.Random) -> str:
    """One of the spellings of a number."""
    sign, size = ("-" if value < 0 else rng.choice(["", "+"])), abs(value)
    if size.denominator == 1:
        separators = [",", "{,}", "\\,", " ", ",\\!"]
        plain = rng.choice(["", "0", "00"]) + str(size)
        text = rng.choice([plain, f"{size.numerator:,}".replace(",", rng.choice(separators)), f"{size}.00"])
    else:
        k = rng.randint(1, 4)
        top, bottom = size.numerator * k, size.denominator * k
        spelled = [rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}", f"{top}/{bottom}"]
        if size > 1:
            spelled.append(rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
        if 10**6 % size.denominator == 0:
            spelled.append(str(float(size)))
        text = rng.choice(spelled)
    around = [
        ("", ""),
        ("$", "$"),
        ("\\(", "\\)"),
        ("x = ", ""),
        ("", "."),
        ("**", "**"),
        ("\\text{", "}"),
        ("", "\\text{ units}"),
    ]
    before, after = rng.choice(around)
    return before + sign + text + after


def test_numbers_agree_with_exact_arithmetic() -> None:
    """Two spelled numbers are the same answer exactly when their values are equal."""
    rng = random.Random(0)
    equal = 0
    for _ in range(5000):
        a = Fraction(rng.randint(-3000, 3000), rng.choice([1, 1, 2, 3, 8, 25]))
        b = a if rng.random() < 0.5 else rng.choice([-a, a + 1, a - 1, a * 10, Fraction(rng.randint(-3000, 3000))])
        gold, answer = dress(a, rng), dress(b, rng)
        assert read_number(gold) is not None, gold
        assert (read_number(gold) == read_number(answer)) == (a == b), (gold, answer)
        equal += a == b
    assert 2000 < equal < 3500


LATEX = [
    (r"\frac{14}{3}", r"\dfrac{14}{3}", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\frac13+\frac16", False),
    (r"10\frac{1}{12}", r"\frac{121}{12}", True),
    (r"k = \frac{-33}{2}", "-16.5", True),
    (r"\$42409", "42,409", True),
    (r"90^\circ", "90", True),
    (r"3\sqrt{13}", r"\sqrt{117}", True),
    (r"3\sqrt{13}", r"3\sqrt{14}", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2, 3)", False),
    ("[0,3)", "[0, 3)", True),
    ("[0,3)", "(0,3)", False),
    ("p - q", "-q+p", True),
    ("p - q", "q-p", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", "Evan", False),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\pi", r"\int_0^{\pi} 1 dx", False),
    (r"\binom{n}{2}", r"\binom{n}{2}", True),
]


@pytest.mark.parametrize(("gold", "answer", "same"), LATEX)
def test_latex(gold: str, answer: str, same: bool) -> None:
    assert outcome(gold, f"so it is \\boxed{{{answer}}}") is (Outcome.CORRECT if same else Outcome.WRONG)


def test_brace_matching_is_linear_and_agrees_with_counting() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice([r"\boxed{", "{", "}", "a", r"\{"]) for _ in range(14))
        assert last_boxed(text) == slow_last_boxed(text), text
    assert last_boxed("\\boxed{" * 300_000 + "7" + "}" * 300_000) is not None
    assert last_boxed("\\boxed{" * 300_000) is None


def slow_last_boxed(text: str) -> str | None:
    """The box whose matching brace is furthest to the right, by counting from each opening anew."""
    best: tuple[int, str] | None = None
    for start in range(len(text)):
        if text.startswith(r"\boxed{", start):
            depth, i = 1, start + 7
            while i < len(text) and depth:
                if text[i] == "\\" and text[i + 1 : i + 2] in ("{", "}"):
                    i += 1
                else:
                    depth += {"{": 1, "}": -1}.get(text[i], 0)
                i += 1
            if not depth and (best is None or i > best[0]):
                best = i, text[start + 7 : i - 1]
    return None if best is None else best[1]


def gold_rows(name: str) -> Iterator[dict[str, str]]:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    with path.open() as lines:
        yield from map(json.loads, lines)


@pytest.mark.parametrize("name", ["math500", "gsm8k_test", "gsm8k_train", "aime2024", "aime2025", "aime2026", "aime_1983_2023"])
def test_every_gold_answer_verifies_itself(name: str) -> None:
    verifier, failed, read = MathAnswer(), [], 0
    for row in gold_rows(name):
        asked = Problem(row["id"], (), row["answer"])
        verifier.check(asked)
        styles = (
            f"\\boxed{{{row['answer']}}}",
            f"**Answer:** ${row['answer']}$.",
            f"<think>no</think>\nAnswer: {row['answer']}",
        )
        failed += [(row["id"], s) for s in styles if verifier(asked, s).outcome is not Outcome.CORRECT]
        read += 1
    assert read >= 30
    assert failed == []


@pytest.mark.parametrize("name", ["gsm8k_test", "aime_1983_2023"])
def test_no_neighbour_of_a_gold_answer_is_accepted(name: str) -> None:
    rows = list(gold_rows(name))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        value = int(row["answer"])
        for wrong in {value + 1, value - 1, -value, value * 10, int(str(abs(value))[::-1]), int(other["answer"])} - {value}:
            assert outcome(row["answer"], f"\\boxed{{{wrong}}}") is Outcome.WRONG, (row["id"], wrong)


@pytest.mark.parametrize("answer", ["", "  ", "{", "}{", "1" * 1001])
def test_gold_answers_that_cannot_be_verified(answer: str) -> None:
    with pytest.raises(ValueError, match="answer"):
        MathAnswer().check(problem(answer))


def test_bad_setting() -> None:
    with pytest.raises(ConfigError, match="max_chars must be at least 1, got 0"):
        MathAnswer(max_chars=0)


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


def test_verifiers_travel_and_are_light() -> None:
    for verifier in (MathAnswer(bare=True), ReasoningGym(partial_credit=True)):
        assert pickle.loads(pickle.dumps(verifier)) == verifier
    heavy = "[m for m in ('torch', 'sympy', 'reasoning_gym', 'transformers') if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, cppo_lightning.verifiers; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_gold_answers_of_latex_sets_pass_the_pool_check() -> None:
    rows = [Problem(row["id"], (), row["answer"]) for row in gold_rows("math500")]
    with VerifierPool(MathAnswer()) as pool:
        assert [p.id for p, v in zip(rows, pool.check(rows), strict=True) if v.outcome is not Outcome.CORRECT] == []
