"""Whether problems that a run is evaluated on are among those it trains on."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cppo_lightning.prompts.dapo import bare_question
from cppo_lightning.verifiers.base import Problem

# Between AIME 1983-2023 and MATH's training split, which took in many of those problems, they find 458 pairs, 95 of them near,
# and none of those looked at is of two problems (at a share of 0.45 the first is).  Between GSM8K's splits they find none,
# where three pairs are alike but for the numbers, and between MATH and MATH-500 29, mostly with one figure or no numbers.
GRAM = 5  # tokens
SHARE = 0.5
MIN_GRAMS = 8  # of the shorter text: "Calculate 3 + 4." resembles every other sum

_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d)(?:\\!|\{,\}|\\,|,)+(?=\d{3}(?!\d))")
_LAYOUT = re.compile(
    r"[\^_]\{\s*\}|\\(?:begin|end)\{[^}]*\}|\\[,;:!> ()\[\]]"
    r"|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|q?quad|text(?:bf|it|rm)?|math(?:rm|bf|cal|bb)|[lcdv]?dots)"
    r"(?![a-zA-Z])"
)
_SIZED = re.compile(r"\\[dt](?=frac|binom)")
_TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|[-+*/^=<>|()!%]")


@dataclass(frozen=True)
class Overlap:
    """A training problem that is, or looks like, an evaluation problem."""

    training: str  # the problems' ids
    evaluation: str
    share: float  # of the shorter text's n-grams, those that are in the other
    exact: bool


def tokens(text: str) -> list[str]:
    """Words, numbers and operators of a question, lower case; without punctuation, and LaTeX's spacing and sizes.

    DAPO's instructions around a question are taken off, and so is the code of a figure, unless it makes up most of a short one.
    """
    text = bare_question(text)
    words = _words(_FIGURE.sub(" ", text))
    return words if len(words) >= GRAM + MIN_GRAMS - 1 else _words(text)


def _words(text: str) -> list[str]:
    text = _SIZED.sub(r"\\", _THOUSANDS.sub("", text))
    return _TOKEN.findall(_LAYOUT.sub(" ", text).casefold())


class TrainingTexts:
    """The questions of the training problems, kept as numbers (4 bytes a token) for one evaluation set after another.

    Two texts match exactly when their :func:`tokens` are equal.  They match nearly when half of the 5-grams of the shorter
    (which must have 8) are in the longer and both or none have numbers, all those of one being in the other: so a question that
    is asked in other words, or of which more is asked, is found, and the same question about other numbers is not.  A question
    without numbers that differs in a word, however much that changes, is found too.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._vocabulary: dict[str, int] = {}
        self._numerals: set[int] = set()  # which of the vocabulary's words are numbers
        self._texts = [(problem.id, self._encode(problem)) for problem in problems]

    def overlaps(self, problems: Sequence[Problem]) -> list[Overlap]:
        """Matches with the given evaluation problems: exact ones first, then by share."""
        texts = [self._encode(problem) for problem in problems]
        sizes: list[int] = []
        numbers = [self._numbers(text) for text in texts]
        by_text: defaultdict[bytes, list[int]] = defaultdict(list)
        by_gram: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, text in enumerate(texts):
            grams = _grams(text)
            sizes.append(len(grams))
            by_text[text.tobytes()].append(place)
            for gram in grams:
                by_gram[gram].append(place)
        found: list[Overlap] = []
        for name, text in self._texts:
            exact = by_text.get(text.tobytes(), [])
            found += [Overlap(name, problems[place].id, 1.0, True) for place in exact]
            grams = _grams(text)
            shared = Counter(place for gram in grams for place in by_gram.get(gram, ()))
            for place, count in shared.items():
                shorter = min(len(grams), sizes[place])
                near = shorter >= MIN_GRAMS and count >= SHARE * shorter and place not in exact
                if near and _alike(self._numbers(text), numbers[place]):
                    found.append(Overlap(name, problems[place].id, count / shorter, False))
        return sorted(found, key=lambda overlap: (not overlap.exact, -overlap.share))

    def _encode(self, problem: Problem) -> array[int]:
        words = tokens(problem.messages[-1]["content"])
        codes = array("I", [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words])
        self._numerals.update(code for word, code in zip(words, codes, strict=True) if word[0].isdecimal())
        return codes

    def _numbers(self, text: array[int]) -> Counter[int]:
        return Counter(code for code in text if code in self._numerals)


def _grams(text: array[int]) -> set[bytes]:
    data, size = text.tobytes(), text.itemsize
    return {data[i : i + GRAM * size] for i in range(0, (len(text) - GRAM + 1) * size, size)}


def _alike(one: Counter[int], other: Counter[int]) -> bool:
    return bool(one) == bool(other) and (one <= other or other <= one)
