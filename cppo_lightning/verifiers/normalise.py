"""Answers as text: where a response states its answer, and which number that text writes.  No expression is evaluated here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

_BRACES = re.compile(r"(?P<box>\\[bf]box(?:ed)?\s*+\{|\\boxed\s*+\{)|\\[{}]|[{}]")
_ANSWER = re.compile(r"\banswer\b[\s*_`]*+(?:is\b[\s*_`]*+)?[:\uff1a][\s*_`]*+", re.IGNORECASE)

# Digits, signs and spaces of other Unicode blocks.  Not NFKC, which would turn a superscript (five squared) into 52.
_PLAIN = str.maketrans(
    {0xFF10 + digit: str(digit) for digit in range(10)}
    | dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"), "-")
    | dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u205f\u3000"), " ")
    | {"\u200b": "", "\ufeff": "", "\uff0b": "+", "\uff0c": ",", "\uff0e": ".", "\u3002": ".", "\u2044": "/"}
)
_MAX_LAYERS = 20  # of dressing around an answer; each may cost a pass over all of it
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("'", "'"), ("\u201c", "\u201d"))
_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt)|bm|bold|boldsymbol|boxed|[fmh]box)\s*\{|\\displaystyle\b|\{"
)
_CONJUNCTION = re.compile(r",?\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING, _CLOSING = frozenset(("(", "[", "{", "\\{")), frozenset((")", "]", "}", "\\}"))
_SPACE = r"(?:\\[,;:! ]|\\quad\b|\s|~)"
_LEADING = re.compile(rf"^(?:{_SPACE}|[*`]|\\approx(?![A-Za-z]))+")
_TRAILING = re.compile(r"(?:\\[.,;:! ]|[.,;:\s~*`])+$")

_SIGN = r"(?P<sign>[+-]?)\s*(?:(?:\\\$|\$|\u20ac|\u00a3|\\pounds\b|\\euro\b)\s*)?"
# Thousands are set apart by 1,000  1{,}000  1,\!000  1\,000  1 000.
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:(?:,\\!\s*|\{,\}|,|\\[,;: ]|~|\s)[0-9]{3})+(?![0-9])|[0-9]+)"
_PART = rf"\s*(?:\{{\s*(?P<NAME>[+-]?\s*{_DIGITS})\s*\}}|(?P<NAME_digit>[0-9]))"
_NUMBERS = (
    re.compile(rf"{_SIGN}(?P<whole>[0-9]+)?\s*\\[dt]?frac{_PART.replace('NAME', 'top')}{_PART.replace('NAME', 'bottom')}"),
    re.compile(rf"{_SIGN}(?:(?P<whole>[0-9]+){_SPACE}+)?(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)"),
    re.compile(rf"{_SIGN}(?P<digits>{_DIGITS}|)\.(?P<decimals>[0-9]+)"),
    re.compile(rf"{_SIGN}(?P<digits>{_DIGITS})"),
)
# Words after a number that change its value are no unit, and a single letter could be a variable.
_CHANGES = (
    r"(?!(?:hundred|thousand|million|billion|trillion|dozen|score|factorial|squared|cubed|pi|or|and|not|plus|minus|times|mod)"
    r"s?\b)"
)
_UNIT = re.compile(
    rf"{_SPACE}*(?:\\?%|(?:\^\s*)?(?:\{{\s*)?(?:\\circ|\\degree|\u00b0)(?:\s*\}})?(?:\s*[CF])?|"
    rf"(?:\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)|mbox|hbox)\s*\{{\s*+{_CHANGES}[^{{}}0-9=<>!]*\}}"
    rf"|(?<=[\s~]){_CHANGES}[a-z]{{2,}}(?:/[a-z]+|[ -]{_CHANGES}[a-z]{{2,}})*)(?:\s*\^\s*\{{?\s*[23]\s*\}}?)?)",
    re.IGNORECASE,
)
_BETWEEN = (",", ";", "\\\\", "\\quad", "\\qquad", "\\lor", "\\vee")  # two equations
_VALUED = re.compile(r"[0-9=]")
_ASSIGNED = re.compile(r"[a-z][^<>!=]*$", re.IGNORECASE)
_NAME = re.compile(r"([A-Za-z]{1,3}(?:_\{?[A-Za-z0-9]+\}?|\([A-Za-z0-9]\))?)\s*=[^=]*")
_LAYOUT = re.compile(rf"\\(?:left|right|displaystyle)(?![A-Za-z])|{_SPACE}")


def strip_thinking(response: str) -> str:
    """What follows the last ``</think>``; with an unclosed ``<think>``, what precedes it."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""Content of the ``\boxed{...}`` that closes last, braces matched; None without one.  Linear in the text's length."""
    opened: list[int] = []  # where each open brace's content begins; -1 for a brace that is not a box's
    found: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(-1)
        elif token[0] == "}" and opened and (begin := opened.pop()) >= 0:
            found = begin, token.start()
    return None if found is None else text[found[0] : found[1]]


def last_answer_line(text: str) -> str | None:
    """What follows the last ``Answer:`` on its line, or on the next line that is not empty; None without one."""
    end = None
    for match in _ANSWER.finditer(text):
        end = match.end()
    return None if end is None else text[end:].partition("\n")[0].strip() or None


def balanced(text: str) -> bool:
    """Whether every brace is matched.  Escaped braces do not count."""
    depth = 0
    for token in _BRACES.finditer(text):
        depth += token[0].endswith("{") - token[0].endswith("}") if token[0] not in ("\\{", "\\}") else 0
        if depth < 0:
            return False
    return depth == 0


def undress(text: str) -> str:
    r"""Strip what people put around an answer: spaces, ``$``, ``\(\)``, bold, quotes, ``\text{}``, a final period."""
    text = text.translate(_PLAIN)
    for _ in range(_MAX_LAYERS):
        before = text
        text = _TRAILING.sub("", _LEADING.sub("", text))
        for opening, closing in _PAIRS:
            inside = text[len(opening) : len(text) - len(closing)]
            if inside and text == opening + inside + closing and opening not in inside.replace("\\$", ""):
                text = inside
        if (style := _STYLE.match(text)) and not style[0].endswith("{"):
            text = text[style.end() :]
        elif style and text.endswith("}") and balanced(inside := text[style.end() : -1]):
            text = inside
        if text == before:
            break
    return text


def commas(text: str) -> str:
    """``text`` with a comma in place of each "and" and "or" between answers."""
    return _CONJUNCTION.sub(",", text)


def nesting(text: str) -> Iterator[tuple[str, int]]:
    """The TeX commands and other characters of ``text``, each with how many brackets are open after it."""
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        yield token, depth


def cut(text: str, separators: tuple[str, ...]) -> tuple[str, ...]:
    """``text`` between the separators that stand in no bracket."""
    pieces = [""]
    for token, depth in nesting(text):
        if depth == 0 and token in separators:
            pieces.append("")
        else:
            pieces[-1] += token
    return tuple(pieces)


def read_number(text: str) -> str | None:
    r"""The number that ``text`` writes, in one canonical spelling (``-5``, ``3/4``); None if it is not just a number.

    Understands integers, decimals, fractions and mixed numbers with thousands separators, leading zeros, a currency sign, a
    unit and a leading ``x =``.  A fraction that reduces to an integer is a sum not yet done, so it gives None, as ``2+3`` does;
    so do several numbers, as in ``x = 1 or x = 2``.
    """
    text = undress(text)
    left, equals, right = text.rpartition("=")
    *others, _ = cut(commas(left), _BETWEEN)  # other equations or values; words, as in "Therefore, x", are neither
    if equals and _ASSIGNED.search(left) and not any(map(_VALUED.search, others)):
        text = undress(right)
    for pattern in _NUMBERS:
        match = pattern.match(text)
        if match and (match.end() == len(text) or _UNIT.fullmatch(text, match.end())):
            return _canonical({name: part for name, part in match.groupdict().items() if part})
    return None


def read_gold_number(text: str) -> str | None:
    """:func:`read_number` of a gold answer, where ``x + y = 0`` is an equation and not the number 0."""
    return None if "=" in text and name_of(text) is None else read_number(text)


def name_of(text: str) -> str | None:
    """``x`` of ``x = 5``; None where no such name stands before a single ``=``."""
    found = _NAME.fullmatch(undress(text))
    return None if found is None else re.sub(r"[{}]", "", found[1]).lower()


def _canonical(parts: dict[str, str]) -> str | None:
    sign = "-" if parts.get("sign") == "-" else ""
    digits = re.sub("[^0-9]", "", parts.get("digits", "0")).lstrip("0") or "0"
    decimals = parts.get("decimals", "").rstrip("0")
    top, bottom = (parts.get(name) or parts.get(f"{name}_digit") for name in ("top", "bottom"))
    if top and bottom:
        numerator, denominator = (int(re.sub("[^-0-9]", "", part)) for part in (top, bottom))
        if denominator == 0 or ("whole" in parts and not 0 < numerator < denominator):
            return None
        value = int(parts.get("whole", "0")) + Fraction(numerator, denominator)
        if value.denominator == 1 and value != 0:
            return None
    elif decimals:
        value = Fraction(f"{digits}.{decimals}")
    else:
        # Stays text: a model may write more digits than Python converts.
        return "0" if digits == "0" else sign + digits
    return str(-value if sign else value)


def squeeze(text: str) -> str:
    r"""``text`` undressed and compact, for comparison letter by letter."""
    return compact(undress(text))


def compact(text: str) -> str:
    r"""``text`` without spacing, ``\left`` and ``\right``, and with ``\frac`` and ``\emptyset`` for their variants."""
    return re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", _LAYOUT.sub("", text)).replace(r"\varnothing", r"\emptyset")
