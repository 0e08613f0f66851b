"""When two answers are the same: numbers, words and answers made of several by their text, the rest as formulas."""

from __future__ import annotations

import re

from cppo_lightning.verifiers import symbolic
from cppo_lightning.verifiers.normalise import balanced, name_of, read_gold_number, read_number, squeeze, undress
from cppo_lightning.verifiers.structure import Parts, based_number, half_of_day, split

# Writing the question down again is no answer: these may stand in a response only if the gold answer has them too.
_UNEVALUATED = re.compile(
    r"\\(?:sum|prod|coprod|i*int|oint|lim|limsup|liminf|max|min|gcd|lcm|[dt]?binom|det|operatorname)(?![A-Za-z])|!|\\frac\s*\{\s*d\s*\}"
)
_TEXT = r"\\(?:text(?:bf|it|rm)?|mbox|mathrm)"
_WORDS = re.compile(rf"\s*\(?\s*{_TEXT}\s*\{{[^{{}}]*[A-Za-z][^{{}}]*\}}\s*\)?[\s.,]*$")
_NO_LETTER = re.compile(rf"{_TEXT}(?![A-Za-z])|[\s{{}}()~.$]")
_SET_BUILDING = re.compile(
    r"[<>=|:]|\\(?:pm|mp|in|notin|cup|cap|setminus|backslash|mathbb|neq?|leq?|geq?|l?dots|emptyset)(?![A-Za-z])"
)
_DIGIT = re.compile("[0-9]")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])|\u00b1")
_MAYBE_THOUSANDS = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z])\s*=([^=<>]+)$")
_LAST_SIDE = re.compile(r"(?<![<>!=])=([^=<>]+)$")


def same(gold: str, answer: str) -> bool:
    """Whether ``answer`` is the gold answer.

    Each rule decides only where it is certain; what none of them decides goes to :func:`symbolic.equal`.
    """
    number = read_gold_number(gold)
    if number is not None:
        return read_number(answer) == number and ("=" not in answer or name_of(gold) in (None, name_of(answer)))
    if squeeze(answer) == squeeze(gold):
        return True
    if not balanced(answer) or set(_UNEVALUATED.findall(answer)) - set(_UNEVALUATED.findall(gold)):
        return False
    if _WORDS.match(gold) or (_WORDS.match(answer) and not _DIGIT.search(answer)):
        return _letters(answer) == _letters(gold)
    based = based_number(gold)
    if based is not None and based[1]:
        other = based_number(answer)
        return other is not None and other[0] == based[0] and other[1] in ("", based[1])
    first, second = split(gold), split(answer)
    agree = _same_parts(first, second) if first and second else _one_and_several(gold, first, answer, second)
    if agree is not None:
        return agree and {half_of_day(gold), half_of_day(answer)} != {"a", "p"}
    if first is None and second is None and (sides := _sides(undress(gold), undress(answer))):
        return same(*sides)
    return symbolic.equal(gold, undress(answer))


def _same_parts(gold: Parts, answer: Parts) -> bool | None:
    """None where the parts do not tell: a list against a point, as ``1,2`` and ``(1,2)``, and lists with ``1 \\pm x``.

    Intervals are united piece by piece, so one that is cut in two is another answer.
    """
    if gold.kind != answer.kind:
        return None if {gold.kind, answer.kind} == {",", "()"} else False
    if gold.ordered:
        return len(gold.items) == len(answer.items) and all(map(same, gold.items, answer.items))
    if any(map(_PLUS_MINUS.search, gold.items + answer.items)):
        return None
    if len(answer.items) > len(gold.items):
        return False
    # With repetitions counted if there are as many, so that 1,1,2 is not 1,2,2 but is 1,2.
    left = list(answer.items)
    for item in gold.items:
        found = next((number for number, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        if len(gold.items) == len(answer.items):
            del left[found]
    return all(any(same(item, other) for item in gold.items) for other in left)


def _one_and_several(gold: str, first: Parts | None, answer: str, second: Parts | None) -> bool | None:
    r"""False for one formula against several; None where one can stand for several, as ``1 \pm x`` and ``x < 2`` do."""
    if first is not None and first.kind == ":":
        ratio = len(first.items) == 2 and read_number(first.items[1]) != "0"
        return ratio and same(f"\\frac{{{first.items[0]}}}{{{first.items[1]}}}", answer)
    if first is not None and first.kind == "=":  # one number, written twice
        return any(same(item, answer) for item in first.items)
    parts, text = (second, gold) if first is None else (first, answer)
    if parts is None or len(parts.items) < 2 or parts.kind in (":", "\\approx", "="):
        return None
    return None if _SET_BUILDING.search(text) or _MAYBE_THOUSANDS.search(gold + answer) else False


def _sides(gold: str, answer: str) -> tuple[str, str] | None:
    """What remains to be compared of ``x = a`` and ``x = b``, of one of these and ``b``, and of ``a`` and ``... = b``."""
    first, second = _ASSIGNMENT.match(gold), _ASSIGNMENT.match(answer)
    if first and second:
        return (first[2], second[2]) if first[1] == second[1] else None
    if first and not _SET_BUILDING.search(answer):
        return first[2], answer
    if not _SET_BUILDING.search(gold) and (last := _LAST_SIDE.search(answer)):
        return gold, last[1]
    return None


def _letters(text: str) -> str:
    return _NO_LETTER.sub("", undress(text)).casefold()
