"""Mathematical answers: the last box or ``Answer:`` line of a response against the gold answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers import symbolic
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict, Verifier
from cppo_lightning.verifiers.equality import same
from cppo_lightning.verifiers.normalise import (
    balanced,
    compact,
    last_answer_line,
    last_boxed,
    read_number,
    squeeze,
    strip_thinking,
    undress,
)
from cppo_lightning.verifiers.structure import split

_OPERATION = re.compile(r"[-+^*/]|\\(?:frac|sqrt|cdot|times)")

# One of each kind of formula, since ANTLR learns its grammar as it reads.
_WARM_UP = (
    (r"\frac{3\sqrt{2}}{2}-\pi", r"-\frac{x^{2}+3x}{\sqrt[3]{y}}"),
    (r"\left(x+1\right)(2x-3)^{12}", r"\sin^{2}\theta+\log_{2}5-e^{-i}"),
    (r"y=-\frac{1}{2}x+2k", r"2x-y\le a_{1}"),
    (r"\{1\pm\sqrt{5},-2\}", r"(-\infty,-2)\cup[3,\infty)"),
    (r"|x|\cdot 90^{\circ}", r"\begin{pmatrix}1&0\\0&-1\end{pmatrix}"),
)


@dataclass(frozen=True)
class MathAnswer(Verifier):
    r"""Reads the last ``\boxed{...}``, else the last ``Answer:`` line, and compares it with the gold answer.

    A gold number is compared as a number that was written out: ``025``, ``25.0`` and ``\$25`` are 25, and ``20+5`` is not;
    ``\frac{6}{8}`` and ``0.75`` are ``\frac{3}{4}``, and ``1-\frac{1}{4}`` is not.  Units are not compared.  Answers made of
    several are compared part by part: points, intervals and matrices in order, lists and sets in any.  Other LaTeX is right
    if it has the gold answer's value and leaves no more arithmetic undone: ``\sqrt{20}`` is ``2\sqrt{5}``, and
    ``\sqrt{5}+\sqrt{5}`` is not.  A right formula that stands in the question, and is not written as the gold answer, is
    WRONG: to simplify or to expand it was what was asked.  More than one answer is WRONG where one is right.

    Reward 1 for a correct answer, else 0.  A thinking block up to ``</think>`` is not read.

    Args:
        bare: also read a response that is nothing but a number.
        max_chars: longest answer that is looked at, in characters.
    """

    bare: bool = False
    max_chars: int = 1000

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ConfigError(f"MathAnswer.max_chars must be at least 1, got {self.max_chars}")

    def prepare(self) -> None:
        """Import math-verify and SymPy, so that no answer's time goes into it."""
        for gold, answer in _WARM_UP:
            symbolic.equal(gold, answer)

    def extract(self, response: str) -> str | None:
        """The answer as the response states it, or None."""
        text = strip_thinking(response)
        found = last_boxed(text)
        if found is None:
            found = last_answer_line(text)
        if found is None and self.bare and len(text) <= self.max_chars and read_number(text) is not None:
            found = text
        return found if found is None or undress(found[: self.max_chars]) else None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        extracted = self.extract(response)
        if extracted is None:
            return Verdict(Outcome.UNPARSEABLE, 0.0)
        if len(extracted) > self.max_chars:
            return Verdict(Outcome.UNPARSEABLE, 0.0, extracted[: self.max_chars], f"answer of {len(extracted)} characters")
        if not same(problem.answer, extracted):
            return Verdict(Outcome.WRONG, 0.0, extracted)
        if _copied(problem, extracted):
            return Verdict(Outcome.WRONG, 0.0, extracted, "a formula of the question, written down again")
        return Verdict(Outcome.CORRECT, 1.0, extracted)

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` unless the gold answer, in a box, is read back and equals itself the way a response must."""
        gold = problem.answer
        if not balanced(gold):
            raise ValueError(f"the answer {gold[:80]!r} has unmatched braces")
        boxed = self.extract(f"\\boxed{{{gold}}}")
        if boxed is None or not boxed.strip() or len(gold) > self.max_chars:
            raise ValueError(f"the answer {gold[:80]!r} is empty or longer than {self.max_chars} characters")
        if not same(gold, boxed):
            raise ValueError(f"the answer {gold[:80]!r} in a box is not found equal to itself")


def _copied(problem: Problem, answer: str) -> bool:
    """Whether a right answer is a formula that the question already has: to expand or to simplify it was what was asked."""
    formula, gold = squeeze(answer), squeeze(problem.answer)
    if formula == gold or len(formula) < 4 or not _OPERATION.search(formula) or read_number(gold) or split(answer):
        return False
    return any(formula in compact(turn.get("content", "")) for turn in problem.messages if turn.get("role") == "user")
