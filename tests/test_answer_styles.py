"""Real gold answers in every style, wrong ones, and math-verify's opinion, with the code of benchmarks/answer_styles.py."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, VerifierPool, symbolic
from cppo_lightning.verifiers.equality import same
from cppo_lightning.verifiers.normalise import read_number
from cppo_lightning.verifiers.structure import based_number

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WHOLE = ("boxed", "Answer:", "bold", "dollars", "period", "\\( \\)", "display", "thinking")  # styles of any answer


@pytest.fixture(scope="module")
def styles() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("answer_styles")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def sets(styles: ModuleType) -> dict[str, list[Problem]]:
    if not styles.DATA.is_dir():
        pytest.skip(f"{styles.DATA.name} is not here")
    return styles.load(styles.DATA)


@pytest.fixture(scope="module")
def formulas(sets: dict[str, list[Problem]]) -> list[str]:
    return sorted({p.answer for problems in sets.values() for p in problems if read_number(p.answer) is None})


@pytest.mark.slow
def test_every_gold_answer_verifies_itself_in_every_style(styles: ModuleType, sets: dict[str, list[Problem]]) -> None:
    verifier, failed, counts = MathAnswer(), [], dict.fromkeys(styles.STYLES, 0)
    for problem in {(p.answer, p.dataset): p for problems in sets.values() for p in problems}.values():
        verifier.check(problem)
        for style, write in styles.STYLES.items():
            if (response := write(problem.answer)) is not None:
                counts[style] += 1
                if verifier(problem, response).outcome is not Outcome.CORRECT:
                    failed.append((problem.id, style, problem.answer))
    assert failed == []
    assert len({counts[style] for style in WHOLE}) == 1
    assert min(counts[style] for style in WHOLE) > 5000
    assert min(counts.values()) > 500


@pytest.mark.slow
def test_no_wrong_answer_is_accepted(styles: ModuleType, sets: dict[str, list[Problem]]) -> None:
    verifier = MathAnswer()
    kinds = styles.perturbed([p for problems in sets.values() for p in problems], 3000, seed=5)
    assert sum(map(len, kinds.values())) == 3000
    assert min(map(len, kinds.values())) > 500
    outcomes = {
        (problem.answer, answer): verifier(problem, f"\\boxed{{{answer}}}").outcome
        for pairs in kinds.values()
        for problem, answer in pairs
    }
    assert len(outcomes) == 3000
    assert {pair: found for pair, found in outcomes.items() if found is not Outcome.WRONG} == {}


def test_perturbations_do_not_depend_on_chance(styles: ModuleType) -> None:
    problems = [
        Problem(str(n), (), answer) for n, answer in enumerate(["17", "-203", r"\frac{12}{5}", r"3\sqrt{13}", "(1,24)"])
    ]
    assert styles.perturbed(problems, 20, seed=1) == styles.perturbed(problems, 20, seed=1)
    assert styles.perturbed(problems, 20, seed=1) != styles.perturbed(problems, 20, seed=2)


@pytest.mark.parametrize(
    ("first", "second", "other"),
    [
        (r"\frac{1}{2}", "0.5", False),
        (r"\frac12", r"\frac13", True),
        (r"3\sqrt{13}", r"\sqrt{117}", False),
        (r"-\frac{3\pi}{4}x^2", r"-0.75\pi x^{2}", False),
        (r"(x+1)(x-2)", "x^2-x-2", False),
        (r"2^{10}", "1024", False),
        ("(1,2)", "(2,1)", True),
        ("1,2", "2,1", False),
        (r"1+2i", "1-2i", True),
        (r"\sqrt[3]{27}", "3", False),
        (r"\text{even}", r"\text{odd}", True),
    ],
)
def test_the_benchmarks_own_evaluator(styles: ModuleType, first: str, second: str, other: bool) -> None:
    assert importlib.import_module("wrong_answers").different(first, second) is other


@pytest.mark.slow
def test_math_verify_says_the_same(styles: ModuleType, formulas: list[str]) -> None:
    """Of gold answers spelled otherwise and of wrong ones; it takes a number in another base for the same number."""
    golds = random.Random(1).sample(formulas, 100)
    wrong = styles.perturbed([Problem(gold, (), gold) for gold in golds], 100, seed=1)
    pairs = [(gold, styles.respell(gold)) for gold in golds]
    pairs += [(problem.answer, answer) for kind in wrong.values() for problem, answer in kind]
    differences = [(g, a) for g, a in pairs if same(g, a) != styles.math_verify_says(g, a)]
    assert [pair for pair in differences if based_number(pair[0]) is None] == []
    assert all(based_number(answer) is not None for _, answer in differences)


def test_fast_reading_of_real_formulas_is_the_full_reading(formulas: list[str]) -> None:
    from math_verify.grader import should_treat_as_complex

    _, full = symbolic._converters()
    compared = 0
    for text in (symbolic.read(gold).text for gold in random.Random(2).sample(formulas, 80)):
        if symbolic.read(text).expression is not None:
            assert symbolic._convert(text) == full(is_real=not should_treat_as_complex(text)).parse(text), text
            compared += 1
    assert compared > 70


def test_gold_answers_of_latex_sets_pass_the_pool_check(sets: dict[str, list[Problem]]) -> None:
    rows = sets["math500"]
    with VerifierPool(MathAnswer()) as pool:
        assert [p.id for p, v in zip(rows, pool.check(rows), strict=True) if v.outcome is not Outcome.CORRECT] == []
