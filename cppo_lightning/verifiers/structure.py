"""Answers made of several: tuples, intervals, lists, sets, unions, matrices, times.  Text only; nothing is evaluated here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cppo_lightning.verifiers.normalise import commas, cut, nesting, read_number, undress

_THOUSANDS = re.compile(r",\\!\s*(?=[0-9])")
_SIZES = re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])")
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}((?:(?!\\begin|\\end).)*)\\end\{\1\}", re.DOTALL)
_BASED = re.compile(r"(-?)\s*(?:\\text\s*\{\s*)?([0-9A-Z]*[0-9][0-9A-Z]*)\s*\}?\s*(?:_\s*\{?\s*([0-9]+)\s*\}?)?")
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z\\])([ap])\.?\s*m\b\.?", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """An answer cut into ``items`` of which each is an answer again.

    ``kind`` tells what may be compared: ``()``, ``[)`` and the like by their delimiters, ``,`` for lists and sets alike,
    ``\\cup``, ``:``, ``\\approx``, ``=`` between numbers, and matrices by their numbers of rows and columns.
    """

    kind: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in (",", "\\cup")


def split(text: str) -> Parts | None:
    r"""The parts of an answer; None for an answer that is one thing.  Linear in the text's length.

    ``(1,2)`` is a point or an interval, whichever: both are compared in order and by their delimiters.  ``1{,}000`` and
    ``1,\!000`` are one number; a comma alone separates.
    """
    text = _MEMBER.sub("", commas(_SIZES.sub("", _THOUSANDS.sub("{,}", undress(text)))))
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return Parts("x".join(map(str, [len(rows), *map(len, rows)])), tuple(cell for row in rows for cell in row))
    if len(united := cut(text, ("\\cup",))) > 1:
        return Parts("\\cup", united)
    if (delimiters := _enclosed(text)) is not None:
        opening, closing = delimiters
        inside = cut(text[len(opening) : len(text) - len(closing)], (",", ";"))
        if opening == "\\{":
            return Parts(",", inside)
        if len(inside) > 1:
            return Parts(opening + closing, inside)
        return None
    for separators in ((",", ";"), (":",), ("\\approx",)):
        if len(listed := cut(text, separators)) > 1:
            return Parts(
                separators[0], listed if separators != (":",) else tuple(_HALF_OF_DAY.sub("", item) for item in listed)
            )
    if len(sides := cut(text, ("=",))) > 1 and all(map(read_number, sides)):
        return Parts("=", sides)
    return None


def based_number(text: str) -> tuple[str, str] | None:
    r"""Digits and base of ``1121_4``, ``\text{A5}_{11}``; the base is empty where none is written.  None if it is neither."""
    found = _BASED.fullmatch(undress(text))
    return None if found is None else (found[1] + found[2].lstrip("0"), found[3] or "")


def half_of_day(text: str) -> str:
    """``a`` or ``p`` where the text says a.m. or p.m., else empty."""
    found = _HALF_OF_DAY.search(text)
    return "" if found is None else found[1].lower()


def _enclosed(text: str) -> tuple[str, str] | None:
    """The brackets around the whole text, which need not be of one shape, as in ``[0,1)``."""
    tokens = list(nesting(text))
    if len(tokens) < 2 or any(depth == 0 for _, depth in tokens[:-1]):
        return None
    opening, closing = tokens[0][0], tokens[-1][0]
    return (opening, closing) if opening in ("(", "[", "\\{") and closing in (")", "]", "\\}") else None
