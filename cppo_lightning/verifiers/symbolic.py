"""Formulas: read by latex2sympy, compared by their values, and by math-verify where values do not tell."""

from __future__ import annotations

import cmath
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

# Where formulas with letters are compared: of both signs, of several sizes, and no root of anything one meets.
_POINTS = (
    ("0.6180339", "-1.3247179", "2.2360679", "1.7320508", "-0.5671432", "3.3598856"),
    ("-2.6854520", "0.9159655", "-1.2020569", "-3.1622776", "1.4513692", "0.2614972"),
    ("1.1865691", "2.8077702", "0.7390851", "-0.4348549", "2.5849817", "-1.9021605"),
)
_DIGITS = 30  # of the values compared
_FAR, _NEAR = 1e-5, 1e-18  # relative differences from which, and up to which, values tell
_MAX_DEPTH = 30  # brackets in brackets; latex2sympy's time grows with a power of it
_GREEK = r"alpha|beta|gamma|delta|epsilon|theta|lambda|mu|omega|phi|varphi|pi|psi|rho|sigma|tau"
_LETTER_BASE = re.compile(rf"(\\(?:{_GREEK})(?![A-Za-z])|[A-Za-df-z])(?=\s*\^)|\\[A-Za-z]+")


@dataclass(frozen=True)
class Formula:
    """``expression`` is a SymPy object, None where latex2sympy does not understand the ``text``."""

    text: str
    expression: Any


def equal(gold: str, answer: str) -> bool:
    r"""Whether two LaTeX formulas are the same and the answer leaves no more arithmetic undone than the gold answer.

    Formulas are compared by their values, those with letters at three points; equations and inequalities by whether one is
    a multiple of the other.  Sets, words, and numbers that agree to five digits but no further, are left to math-verify,
    which takes a decimal that agrees to six places.

    Raises:
        MemoryError, RecursionError: the formulas are too large.
    """
    first, second = read(gold), read(answer)
    if first.text == second.text:
        return True
    if first.expression is None or second.expression is None:
        return False
    # First, as it evaluates no power tower.
    if undone(second.expression) > undone(first.expression):
        return False
    same = _compare(first.expression, second.expression)
    return _math_verify(first.expression, second.expression) if same is None else same


@lru_cache(maxsize=1024)
def read(latex: str) -> Formula:
    """What math-verify would read in a box with this content, at a fraction of the time."""
    from math_verify.parser import LatexExtractionConfig, get_last_eq, normalize_latex

    config = LatexExtractionConfig().normalization_config
    text = normalize_latex(f"\\boxed{{{latex}}}", config)
    for candidate in dict.fromkeys((text, get_last_eq(text))) if _depth(text) <= _MAX_DEPTH else ():
        try:
            return Formula(text, _convert(candidate))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # latex2sympy has no type of its own for what it cannot read
            logging.getLogger(__name__).debug("%s: %r", type(error).__name__, candidate)
    return Formula(text, None)


def _depth(text: str) -> int:
    """Most brackets open at once, bars taken for brackets that nothing closes."""
    return max(accumulate((c in "({[|") - (c in ")}]") for c in text), default=0)


def _convert(text: str) -> Any:
    """latex2sympy with ANTLR's fast prediction, and with its full one where that finds an error.

    By ANTLR's definition the two agree on whatever the fast one accepts.  It takes ``x^`` for the beginning of ``x^{a}_{b}``
    and so fails at ``x^2+1``, but not at ``{x}^2+1``.  ``e^`` is a token of its own.
    """
    from math_verify.grader import should_treat_as_complex

    fast, full = _converters()
    real = not should_treat_as_complex(text)
    try:
        return fast(is_real=real).parse(_LETTER_BASE.sub(_braced, text))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the bare class again
        return full(is_real=real).parse(text)


def _braced(found: re.Match[str]) -> str:
    return f"{{{found[1]}}}" if found[1] else found[0]


@cache
def _converters() -> tuple[type, type]:
    from antlr4 import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    class Fast(_Latex2Sympy):
        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = PredictionMode.SLL
            return parser

    return Fast, _Latex2Sympy


def undone(expression: Any, within: Any = None) -> int:
    r"""How many sums, products, powers and functions of numbers alone are written down and not worked out.

    ``\sqrt{45}+\sqrt{20}`` has one, ``5\sqrt{5}`` none, ``1+\sqrt{5}`` and ``2^{27}`` one.  A fraction counts as worked out.
    ``within`` is the operation that the expression is an argument of: nested sums are counted as one.
    """
    from sympy import Add, Basic, Function, Integer, Mul, Pow, Rational

    if not isinstance(expression, Basic):
        return 0
    count = sum(undone(argument, expression.func) for argument in expression.args)
    if isinstance(expression, Add) and within is not Add:
        count += max(0, sum(not term.free_symbols for term in _terms(expression)) - 1)
    elif isinstance(expression, Mul) and within is not Mul:
        count += max(0, sum(isinstance(factor, Integer) and abs(factor) != 1 for factor in _terms(expression)) - 1)
    elif isinstance(expression, Pow) and isinstance(expression.base, Integer):
        exponent = expression.exp
        if isinstance(exponent, Rational):
            whole = exponent > 1 if isinstance(exponent, Integer) else Pow(expression.base, exponent).is_rational
            count += bool(whole)
    elif isinstance(expression, Function) and not expression.free_symbols:
        count += not expression.doit().has(Function)
    return count


def _terms(node: Any) -> list[Any]:
    """Arguments of nested sums, or of nested products, as those of one."""
    return [inner for part in node.args for inner in (_terms(part) if isinstance(part, node.func) else [part])]


def _compare(gold: Any, answer: Any) -> bool | None:
    """True or False where values tell, else None."""
    from latex2sympy2_extended import is_expr_of_only_symbols
    from sympy import Expr
    from sympy.core.relational import Relational

    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _compare_relations(gold, answer)
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return None
    if is_expr_of_only_symbols(gold) or is_expr_of_only_symbols(answer):  # words, which are products of letters to SymPy
        return None
    near = True
    for first, second, difference in _values(gold, answer, gold - answer):
        if first is None or second is None:
            return None
        if cmath.isinf(first) or cmath.isinf(second):
            if first != second:
                return False
            continue
        size = max(abs(first), abs(second))
        if abs(first - second) > _FAR * size:
            return False
        near = near and difference is not None and abs(difference) <= _NEAR * size
    return True if near else None


def _compare_relations(gold: Any, answer: Any) -> bool | None:
    from sympy import Eq, Expr, GreaterThan, Ne, StrictGreaterThan

    if not all(isinstance(side, Expr) for side in (*gold.args, *answer.args)):
        return None
    if not (gold.free_symbols and answer.free_symbols):
        return False  # true or false of itself, and so a multiple of any other
    sides = [relation.lhs - relation.rhs for relation in (gold, answer)]
    flips = [isinstance(relation, GreaterThan | StrictGreaterThan) for relation in (gold, answer)]
    if (gold.reversed if flips[0] != flips[1] else gold).func is not answer.func:
        return False
    factors = []
    for first, second in _values(*sides):
        if first is None or second is None:
            return None
        if 0 in (first, second) or cmath.isinf(first) or cmath.isinf(second):
            return False  # one holds of itself, or nowhere, and is not written as the other
        factors.append(second / first * (-1 if flips[0] != flips[1] else 1))
    multiple = all(abs(factor - factors[0]) < _FAR * abs(factors[0]) for factor in factors)
    return multiple and (isinstance(gold, Eq | Ne) or factors[0].real > 0)


def _values(*expressions: Any) -> Iterator[tuple[complex | None, ...]]:
    """The values of all expressions at each point; at one point only where there are no letters."""
    names = sorted({symbol.name for expression in expressions for symbol in expression.free_symbols})
    for point in _POINTS if names else _POINTS[:1]:
        # Beyond the sixth letter the numbers repeat, shifted.
        values = {name: point[i % 6] + str(i // 6) for i, name in enumerate(names)}
        yield tuple(_value(expression, values) for expression in expressions)


def _value(expression: Any, values: dict[str, str]) -> complex | None:
    from sympy import Float

    numbers = {symbol: Float(values[symbol.name], _DIGITS) for symbol in expression.free_symbols}
    try:
        exact = expression.evalf(_DIGITS, subs=numbers)
        value = complex(exact)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return None  # not a number here, or none that SymPy can work out
    out_of_range = (cmath.isinf(value) and not exact.is_infinite) or (value == 0 and not exact.is_zero)
    return None if out_of_range or cmath.isnan(value) else value


def _math_verify(gold: Any, answer: Any) -> bool:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    # A time limit inside would be reported as "not equal"; the pool's deadline tells the two apart.
    return math_verify.verify([gold], [answer], timeout_seconds=None, raise_on_error=True)
