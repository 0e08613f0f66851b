"""Chains of operations modulo 10: as long as wanted, and one wrong step spoils all that follow it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRows
from cppo_lightning.prompts.holdout import Split, check_split, in_split
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.verifiers.base import Problem

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# A factor that shares a divisor with 10 would make two values one: wrong steps before it would be mended by it.
_OPERANDS = {"+": range(10), "-": range(10), "*": (1, 3, 7, 9)}
_PATIENCE = 10_000  # draws in a row that bring nothing new before there is said to be no more


def draw_chain(operations: int, generator: random.Random) -> str:
    """A chain as it is asked: a start digit, operators and operands, and, for the answer to go on from, the start again."""
    start, signs = generator.randrange(10), generator.choices(list(OPERATORS), k=operations)
    return f"{start}{''.join(f'{sign}{generator.choice(_OPERANDS[sign])}' for sign in signs)}={start},"


def running_values(chain: str, slip: Callable[[int], int] = int) -> str:
    """What a chain comes to after each operation, as it is answered.

    ``slip`` gets each value and returns the one that is written, with which the chain goes on; left out, none is changed.
    """
    formula, _, _ = chain.partition("=")
    value, values = int(formula[0]), []
    for sign, operand in zip(formula[1::2], formula[2::2], strict=True):
        value = slip(OPERATORS[sign](value, int(operand)) % 10)
        values.append(str(value))
    return ",".join(values)


@dataclass(frozen=True)
class ChainPrompts(PromptSource):
    """Distinct chains of ``+``, ``-`` and ``*`` modulo 10, such as ``7+5*3=7,``, whose answer is every running value: ``2,6``.

    Factors are 1, 3, 7 and 9, so that a wrong value stays wrong until another mistake.  Which chains are held out depends on
    their text alone.  A model answers with two tokens for each operation where digits and commas are tokens; ``ChainVerifier``
    judges the last digit.

    Args:
        operations: in each chain.
        count: chains to load; fewer are the first of more.
        seed: of the drawing.
        heldout_share: share of all possible chains that belong to "heldout", from 0 to below 1.
        split: which part to load.

    Raises:
        ConfigError: a value outside its range.
    """

    operations: int
    count: int = 1000
    seed: int = 0
    heldout_share: float = 0.1
    split: Split = "train"

    def __post_init__(self) -> None:
        for name in ("operations", "count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ChainPrompts.{name} must be at least 1, got {getattr(self, name)}")
        check_split(type(self).__name__, self.split, self.heldout_share)

    def chains(self) -> list[str]:
        """The chains as they are asked, in the order in which they are first drawn.

        Raises:
            ConfigError: there are not that many of so few operations.
        """
        generator = random.Random(self.seed)
        found: dict[str, None] = {}
        idle = 0
        while len(found) < self.count:
            chain = draw_chain(self.operations, generator)
            if chain in found or not in_split(chain, self.split, self.heldout_share):
                idle += 1
            else:
                found[chain], idle = None, 0
            if idle == _PATIENCE:
                raise ConfigError(
                    f"ChainPrompts.count = {self.count}, but {_PATIENCE} draws in a row found no more than {len(found)} chains "
                    f"of operations = {self.operations} in the split {self.split!r} at heldout_share = {self.heldout_share}; "
                    "take fewer, or longer chains"
                )
        return list(found)

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        """The chains as problems.  Raises :class:`ConfigError` if there are not that many of so few operations."""
        problems = [
            Problem(
                id=f"chain-{chain.partition('=')[0]}",
                messages=({"role": "user", "content": chain},),
                answer=running_values(chain),
                source=f"chain of {self.operations}",
            )
            for chain in self.chains()
        ]
        if bad_rows is not None:
            bad_rows.rows += len(problems)
        return problems
