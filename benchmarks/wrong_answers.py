"""Wrong answers made from right ones, and an evaluator of its own that sees to it that they are wrong."""

from __future__ import annotations

import cmath
import random
import re
from collections.abc import Sequence

from cppo_lightning.verifiers import Problem
from cppo_lightning.verifiers.normalise import read_number, undress
from cppo_lightning.verifiers.structure import split

INTEGER = re.compile("-?[0-9]+")


def off_by_one(gold: str, rng: random.Random) -> str | None:
    found = list(re.finditer(r"(?<![0-9])(?<!\}\^)[0-9]+", gold))  # what follows \text{...}^ is a unit's
    if not found:
        return None
    number = rng.choice(found)
    return gold[: number.start()] + str(abs(int(number[0]) + rng.choice((-1, 1)))) + gold[number.end() :]


def sign_flipped(gold: str, rng: random.Random) -> str | None:
    parts = split(gold)
    if "=" in gold:
        return f"-{gold}" if gold.endswith("0") else gold.replace("=", "=-", 1)
    if parts is None:
        return str(-int(gold)) if INTEGER.fullmatch(gold) else f"-{gold}" if read_number(gold) else f"-({gold})"
    item = rng.choice(parts.items).strip()
    if read_number(item) in ("0", None):
        return None
    return gold.replace(item, item.removeprefix("-") if item.startswith("-") else f"-{item}", 1)


def digits_swapped(gold: str, rng: random.Random) -> str | None:
    places = [i for i in range(len(gold) - 1) if gold[i : i + 2].isdigit() and gold[i] != gold[i + 1]]
    if not places:
        return None
    i = rng.choice(places)
    return gold[:i] + gold[i + 1] + gold[i] + gold[i + 2 :]


PERTURBATIONS = {"off by one": off_by_one, "sign flipped": sign_flipped, "digits swapped": digits_swapped}
ANOTHER = "another's answer"


def perturbed(problems: Sequence[Problem], number: int, seed: int) -> dict[str, list[tuple[Problem, str]]]:
    """Problems with a wrong answer each, by kind: ``number`` distinct ones, about as many to formulas as to numbers."""
    rng = random.Random(seed)
    kinds: dict[str, list[tuple[Problem, str]]] = {name: [] for name in (*PERTURBATIONS, ANOTHER)}
    seen: set[tuple[str, str]] = set()

    def add(kind: str, problem: Problem, answer: str | None) -> None:
        if answer is not None and (problem.answer, answer) not in seen and different(problem.answer, answer):
            seen.add((problem.answer, answer))
            kinds[kind].append((problem, answer))

    formulas = [p for p in problems if read_number(p.answer) is None]
    groups = [group for group in (formulas, [p for p in problems if read_number(p.answer) is not None]) if group]
    for kind, change in PERTURBATIONS.items():
        for group in groups:
            limit = len(kinds[kind]) + number // (4 * len(groups))
            for problem in 3 * rng.sample(group, len(group)):
                if len(kinds[kind]) < limit:
                    add(kind, problem, change(problem.answer, rng))
    for _ in range(20 * number):  # fills up what the shorter kinds leave
        if sum(map(len, kinds.values())) >= number:
            break
        add(ANOTHER, rng.choice(rng.choice(groups)), rng.choice(rng.choice(groups)).answer)
    return kinds


def different(gold: str, answer: str) -> bool:
    """Whether two answers have other values; where these cannot be worked out here, whether they have other characters."""
    first, second = values(gold), values(answer)
    if first is None or second is None or len(first) != len(second):
        bare = [sorted(re.sub(r"\\(?:left|right|[dt]?frac|text|[,;:! ])|[\s{}()$.]", "", undress(x))) for x in (gold, answer)]
        return bare[0] != bare[1]
    if split(gold) and "[" not in gold and "(" not in gold:
        first, second = (sorted(x, key=lambda z: (round(z.real, 9), round(z.imag, 9))) for x in (first, second))
    return any(abs(a - b) > 1e-9 * max(1, abs(a)) for a, b in zip(first, second, strict=True))


LETTERS = {letter: complex(0.3 + 0.17 * i, 0) for i, letter in enumerate("abcdefghjklmnopqrstuvwxyz")} | {"i": 1j}
NAMED = {"\\pi": complex(cmath.pi), "\\theta": 0.77 + 0j, "\\infty": 1e12 + 0j}
TOKENS = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[A-Za-z]+|[A-Za-z]|[-+*/^(){}\[\]]")


def values(text: str) -> list[complex] | None:
    """The values of an answer's parts, letters at fixed points; None for what this does not read."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! $%]|\{,\}|\^\s*\{?\\circ\}?|\$", "", undress(text))
    text = re.sub(r"\\(?:text|mbox|mathrm)\{[^{}]*\}", "", re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text))
    text = re.sub(r"^\s*[A-Za-z]\s*=", "", re.sub(r"\\[dt]frac", r"\\frac", text))
    parts = split(text)
    try:
        return [Evaluator(item).whole() for item in (parts.items if parts else (text,))]
    except (ValueError, ArithmeticError):
        return None


class Evaluator:
    """Sums, products, powers, fractions and roots by recursive descent."""

    def __init__(self, text: str) -> None:
        self.tokens = TOKENS.findall(text)
        if "".join(self.tokens) != re.sub(r"\s", "", text):
            raise ValueError(text)

    def whole(self) -> complex:
        value = self.sum()
        if self.tokens:
            raise ValueError(self.tokens)
        return value

    def take(self, *expected: str) -> str:
        if not self.tokens or (expected and self.tokens[0] not in expected):
            raise ValueError(f"{expected} in {self.tokens}")
        return self.tokens.pop(0)

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[0] in tokens

    def sum(self) -> complex:
        value = -self.product() if self.next_is("-") and self.take() else self.product()
        while self.next_is("+", "-"):
            value += self.product() if self.take() == "+" else -self.product()
        return value

    def product(self) -> complex:
        before, value = self.tokens[:1], self.power()
        while self.tokens and not self.next_is("+", "-", ")", "}", "]"):
            if self.next_is("/"):
                self.take()
                value /= self.power()
            elif self.next_is("\\frac") and before and before[0].isdigit():  # a mixed number, where it is one
                value = value + self.power() if self.tokens[1:2] and value.imag == 0 else value * self.power()
            else:
                if self.next_is("*", "\\cdot", "\\times"):
                    self.take()
                value *= self.power()
            before = []
        return value

    def power(self) -> complex:
        value = self.atom()
        if self.next_is("^"):
            self.take()
            value = value ** self.argument()
        return value

    def argument(self) -> complex:
        """A braced group, or else one character."""
        if self.tokens and self.tokens[0].isdigit() and len(self.tokens[0]) > 1:
            first, self.tokens[0] = self.tokens[0][0], self.tokens[0][1:]
            return complex(first)
        return self.atom()

    def atom(self) -> complex:
        token = self.take()
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\sqrt":
            degree = 2 + 0j
            if self.next_is("["):
                self.take()
                degree = self.sum()
                self.take("]")
            return self.argument() ** (1 / degree)
        if token in NAMED:
            return NAMED[token]
        return LETTERS[token.lower()] if token.isalpha() else complex(token)
