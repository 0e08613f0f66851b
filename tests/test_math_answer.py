"""MathAnswer: what counts as the same answer, compared with exact arithmetic, with SymPy and with what people write."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import pytest

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, symbolic
from cppo_lightning.verifiers.equality import same
from cppo_lightning.verifiers.normalise import last_boxed, read_number
from cppo_lightning.verifiers.structure import split

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


# (gold, accepted, refused)
LATEX: list[tuple[str, list[str], list[str]]] = [
    (r"\frac{14}{3}", [r"\dfrac{14}{3}", r"4\frac23", "14/3"], ["14", r"\frac{3}{14}"]),
    (r"\frac{3}{4}", [r"\frac{6}{8}", "0.75", "3/4"], [r"1-\frac14", r"\frac12+\frac14", r"3\cdot\frac14"]),
    (r"\frac{4}{3}", [r"1\frac13"], ["1.333333"]),
    (r"10\frac{1}{12}", [r"\frac{121}{12}"], [r"\frac{10}{12}"]),
    (r"\dfrac{1}{29,\!322,\!216}", ["1/29322216"], ["1/29322217"]),
    (r"11,\! 111,\! 100", ["11111100", "11,111,100"], ["11,111,101"]),
    (r"k = \frac{-33}{2}", ["-16.5", "k=-16.5"], ["16.5", "x=-16.5", "-k=-16.5"]),
    ("y=-1", ["-1", "y = -1"], ["x=-1", "1"]),
    (
        "3",
        ["a = b = 3", "x = 2y = 3", "f(1,2) = 3", r"a+b=3", r"\angle ABC = 3", "Therefore, x = 3"],
        [
            *(r"x=-3 \text{ or } x=3", "x=1 or x=2 or x=3", "x_1=-3, x_2=3", "a=5, b=3", "5; x=3", r"x=3 \text{ and } x=-3"),
            *(r"x=-3 \quad x=3", r"x=-3 \lor x=3", r"x=-3 \\ x=3"),
        ],
    ),
    (r"\frac12", [r"P(B)=\frac12"], [r"P(A)=\frac13, P(B)=\frac12"]),
    (r"-\frac52", ["-2 1/2", r"-2\,1/2", "-2 1/2 cm"], ["-1", "-2 5/2", "-21/2", "2 1/2", "-2 0/2", "-2 1/2 1/2"]),
    (r"\frac{2100}{9}", ["2100/9"], ["2 100/9"]),
    (r"\emptyset", [r"\varnothing"], ["0", r"\{0\}"]),
    (r"\$42409", ["42,409"], ["42,408"]),
    (r"90^\circ", ["90", r"90^{\circ}"], ["9"]),
    (r"\approx 8.24 \text{ mph}", ["8.24"], ["8.25"]),
    (r"3\sqrt{13}", [r"\sqrt{117}", r"\sqrt{13}\cdot 3", r"x=3\sqrt{13}", r"3\sqrt{13}\approx 10.8"], [r"3\sqrt{14}", "10.8"]),
    (r"3\sqrt{13}", [r"(3\sqrt{13})", r"\{3\sqrt{13}\}"], [r"3\sqrt{13}, 5", r"3\sqrt{13}\text{ or }5", r"3\sqrt{13} < 11"]),
    (r"5\sqrt5", [r"\sqrt{125}"], [r"\sqrt{45}+\sqrt{20}", r"2\sqrt5+3\sqrt5"]),
    (r"25\pi", [r"\pi 25", r"25 \cdot \pi"], [r"5^2\pi", r"5\cdot5\pi", r"20\pi+5\pi", r"\sqrt{625}\pi", r"\int_0^{25}\pi dx"]),
    (r"2^{27}-2^{11}", ["134215680"], ["134215681", "2^{27}-2^{12}"]),
    (r"3+2\sqrt2", [r"3+\sqrt8"], [r"1+2+2\sqrt2", "3+2"]),
    (r"\sqrt2", ["1.414214", r"\frac{2}{\sqrt2}"], ["1.41", "1.414215", r"\sqrt2!", r"|\sqrt2", "0"]),
    (r"10^{-7}\pi", [r"\frac{\pi}{10000000}"], ["0.0", "0"]),
    (r"2^{4181}", [r"2^{4181}"], ["2^{4183}", r"4^{4181}"]),
    (r"6 - 5i", ["6-5i", "-5i+6"], ["6+5i", "-6-5i", "6"]),
    (
        r"\left( 3, \frac{\pi}{2} \right)",
        [r"(3,\pi/2)", r"\left(3, 0.5\pi\right)"],
        [r"(\pi/2, 3)", r"(3,\pi)", r"(3,\pi/2,0)", "3"],
    ),
    ("(3,1)", ["( 3 , 1 )", "3,1"], ["(5,2)", "(1,3)", "[3,1]", "(3,1]", r"(2+1, 1)"]),
    ("[0,3)", ["[0, 3)", r"x \in [0,3)"], ["(0,3)", "[0,3]", "[0,4)"]),
    (
        r"(-\infty,2)\cup(3,\infty)",
        [r"(3,\infty)\cup(-\infty,2)"],
        [r"(-\infty,2]\cup(3,\infty)", r"(3,\infty)", r"(-2,\infty)\cup(3,\infty)"],
    ),
    ("81, 256", ["256, 81", r"\{81, 256\}", r"81 \text{ and } 256", "81 or 256"], ["81256", "81", "81,256,3", "81, 257"]),
    ("1, 1, 2", ["2,1,1", "1,2"], ["1,2,2", "1,2,3", "2"]),
    (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}"], [r"1+\sqrt{19}", r"1\pm\sqrt{18}"]),
    (r"60^\circ, 120^\circ", ["60, 120", r"120^\circ, 60^\circ"], ["60", "60,121"]),
    (
        r"\begin{pmatrix} 1 & 0 \\ 0 & -1 \end{pmatrix}",
        [r"\begin{bmatrix}1&0\\0&-1\end{bmatrix}."],
        [
            r"\begin{pmatrix}1&0\\0&1\end{pmatrix}",
            r"\begin{pmatrix}1&0&0&-1\end{pmatrix}",
            r"\begin{pmatrix}1\\0\\0\\-1\end{pmatrix}",
            "(1,0,0,-1)",
        ],
    ),
    ("p - q", ["-q+p"], ["q-p", "p"]),
    ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2"], ["x^2+2x+2", "(x+1)^3", "x^2+x+x+1+1"]),
    (r"\sqrt{x^2}", ["|x|"], ["x"]),
    (r"\sin^2 x", [r"1-\cos^2 x"], [r"\cos^2 x"]),
    (r"\binom{n}{2}", [r"\binom{n}{2}"], [r"\binom{n}{3}"]),
    ("y = 2x - 13", ["2x-13", "y-2x=-13", "y=-13+2x"], ["y=2x+13", "x=2y-13", "-13", "0=0", "y=2x"]),
    ("2x - y + 2z - 18 = 0", ["4x-2y+4z=36", "2x-y+2z=18"], ["0", "2x-y+3z-18=0", "2x-y+2z-17=0", "0=0", "1=2", "18"]),
    (r"s^2 \le 8r^2", [r"8r^2 \ge s^2"], [r"s^2 \ge 8r^2", r"s^2 < 8r^2", r"s^2 \le 9r^2", r"8r^2 \le s^2"]),
    (r"-80\leq g(x)\leq 82", ["[-80,82]"], [r"-81\leq g(x)\leq 82", "[-80,83]"]),
    (r"1121_4", ["1121_{4}", "1121"], ["1122_4", "1121_5", "89"]),
    (r"\text{A5}_{11}", [r"A5_{11}"], [r"A6_{11}", r"\text{A5}_{12}"]),
    ("-37_8", ["-37_{8}"], ["37_8", "-37_7"]),
    (r"05\!:\!00", ["05:00", "5:00"], ["05:01", "6:00", "5", r"3\sqrt{11}", "0"]),
    (r"4\!:\!51\!:\!06 \text{ p.m.}", ["4:51:06 p.m.", "4:51:06"], [r"4\!:\!51\!:\!06 \text{ a.m.}", r"4:51:07 \text{ p.m.}"]),
    ("5:6", ["5 : 6", r"\frac56"], ["6:5", "5:7", "5"]),
    (r"0.56 = 56\%", ["0.56", r"56\%", r"0.56=56\%"], [r"0.56=57\%", "0.57", "0.57 = 57\\%", "5.6"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}"], ["Evan", "nylevE"]),
    (r"\text{(E)}", ["E", "(E)", r"\text{E}"], ["D", r"\text{(D)}"]),
    (r"\text{even}", ["even"], ["neve", r"e^2 n v", "odd"]),
    ("CD", ["CD", r"\text{CD}"], ["C", r"\text{CE}"]),
]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [(gold, a, right) for gold, *both in LATEX for right, answers in zip((True, False), both, strict=True) for a in answers],
)
def test_latex(gold: str, answer: str, right: bool) -> None:
    assert outcome(gold, f"so it is \\boxed{{{answer}}}") is (Outcome.CORRECT if right else Outcome.WRONG)


def test_splitting_leaves_numbers_and_formulas_whole() -> None:
    for one in ("1{,}000", r"1,\!000", "(x+1)(x+2)", r"\frac{1}{2}", "f(1,2)", r"\{\sqrt2", "", r"\binom{4}{2}"):
        parts = split(one)
        assert parts is None or len(parts.items) == 1, one
    united = split(r"[1,2)\cup\left(3,\infty\right)")
    assert united is not None
    assert [item.strip() for item in united.items] == ["[1,2)", r"(3,\infty)"]


def random_formula(rng: random.Random, depth: int) -> Any:
    """A SymPy expression in x and y, not evaluated."""
    import sympy

    if depth == 0:
        return rng.choice([sympy.Symbol("x"), sympy.Symbol("y"), sympy.Integer(rng.randint(1, 9))])
    first, second = random_formula(rng, depth - 1), random_formula(rng, depth - 1)
    return rng.choice([first + second, first - 2 * second, first * second, first / (1 + second**2), sympy.sqrt(first**2 + 3)])


def test_formulas_agree_with_sympy() -> None:
    """What SymPy has expanded or put together is the same; changed, it is what its value at a point of this test's own says."""
    import sympy

    rng, x, equal = random.Random(3), sympy.Symbol("x"), 0
    point = [(x, sympy.Rational(-31, 7)), (sympy.Symbol("y"), sympy.Rational(12, 5))]
    for _ in range(40):
        formula = random_formula(rng, 3)
        rewritten = rng.choice([sympy.expand, sympy.together, sympy.factor])(formula)
        changed = rng.choice([formula + x / 1000, formula * sympy.Rational(1001, 1000), -formula, formula.subs(x, -x)])
        gold, *answers = (symbolic.read(sympy.latex(f)) for f in (formula, rewritten, changed))
        for answer, other in zip(answers, (rewritten, changed), strict=True):
            assert answer.expression is not None, answer
            values = [sympy.N(f.subs(point), 40) for f in (formula, other)]
            truth = abs(values[0] - values[1]) <= sympy.Float("1e-30") * abs(values[0])
            if symbolic.undone(answer.expression) <= symbolic.undone(gold.expression):
                assert same(gold.text, answer.text) == truth, (gold, answer)
                equal += bool(truth)
    assert 20 < equal < 60


FORMULAS = [
    *("x^2+1", "x^{n+1}-x_1^2", r"\pi^3 r", r"e^{x^2}", r"a^{2}b^{3}", r"\sin^2 x", r"\log_2 8", r"\theta^2+\alpha^2"),
    *(r"(x^2+1)^3", r"2^{x}3^y", r"\sqrt[3]{x^2}", r"|x^2-1|", r"A^{-1}", r"x^\circ", r"y=x^2", r"x^2<4", r"[0,x^2)", r"x^23"),
    *(
        r"\frac{x^2}{y^2}",
        r"x^{y^{z}}",
        r"\{x^2,y^2\}",
        r"-x^4",
        r"f(x)",
        r"i^2+\sqrt{3}i",
        r"\begin{pmatrix}x^2\\1\end{pmatrix}",
    ),
]


def test_fast_reading_is_the_full_reading() -> None:
    """ANTLR's SLL prediction, and its full LL prediction on the text as it is."""
    from math_verify.grader import should_treat_as_complex

    _, full = symbolic._converters()
    for text in FORMULAS:
        assert symbolic._convert(text) == full(is_real=not should_treat_as_complex(text)).parse(text), text


def test_arithmetic_left_undone_does_not_depend_on_order() -> None:
    terms = ["1", r"\sqrt{2}", "x", r"3\sqrt{5}"]
    counts = {symbolic.undone(symbolic.read("+".join(order)).expression) for order in itertools.permutations(terms)}
    assert counts == {2}


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_running_out_of_memory_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    class Exhausted:
        def __init__(self, **_: object) -> None: ...

        def parse(self, _: str) -> None:
            raise error

    monkeypatch.setattr(symbolic, "_converters", lambda: (Exhausted, Exhausted))
    with pytest.raises(error):
        MathAnswer()(problem(r"\sqrt{71}"), r"\boxed{\sqrt{72}+1}")


def test_formulas_nested_too_deeply_are_wrong() -> None:
    for deep in ("(" * 400 + "2" + ")" * 400, "{" * 400 + "2" + "}" * 400, "|" * 400, r"\{" * 100 + "2" + r"\}" * 100):
        assert outcome(r"\sqrt{2}", f"\\boxed{{{deep}+1}}") is Outcome.WRONG


@pytest.mark.parametrize(
    ("question", "gold", "answer", "right"),
    [
        (r"Simplify $\frac{1}{\sqrt{2} - 1}$.", r"1+\sqrt2", r"\frac{1}{\sqrt2-1}", True),
        (r"Simplify $\frac{1}{\sqrt{2}-1}$.", r"1+\sqrt2", r"\dfrac{1}{\sqrt{2} - 1}", False),
        ("Expand $(x+1)(x+2)$.", "x^2+3x+2", "(x + 1)(x+2)", False),
        ("Expand $(x+1)(x+2)$.", "x^2+3x+2", "(x+2)(x+1)", True),
        ("Expand $(x+1)(x+2)$.", "x^2+3x+2", "x^2+3x+2", True),
        ("Is $x^2-1$ equal to $(x-1)(x+1)$ or to $(x-1)^2$?", "(x-1)(x+1)", "(x-1)(x+1)", True),
        (r"Does it pass through $(-1,\sqrt{4})$ or $(-1,3)$?", "(-1,2)", "(-1,2)", True),
    ],
)
def test_a_formula_copied_from_the_question_is_no_answer(question: str, gold: str, answer: str, right: bool) -> None:
    asked = Problem("p", ({"role": "system", "content": "(x+2)(x+1)"}, {"role": "user", "content": question}), gold)
    verdict = MathAnswer()(asked, f"\\boxed{{{answer}}}")
    assert verdict.outcome is (Outcome.CORRECT if right else Outcome.WRONG)
    assert ("question" in verdict.detail) == (not right)
    assert verdict.reward == float(right)


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


@pytest.mark.parametrize("answer", ["", "  ", "{", "}{", "1" * 1001])
def test_gold_answers_that_cannot_be_verified(answer: str) -> None:
    with pytest.raises(ValueError, match="answer"):
        MathAnswer().check(problem(answer))


def test_bad_setting() -> None:
    with pytest.raises(ConfigError, match="max_chars must be at least 1, got 0"):
        MathAnswer(max_chars=0)
