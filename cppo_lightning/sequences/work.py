"""What a forward pass costs, which decides what is computed together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a causal LM's forward pass.

    Args:
        per_token: of its matrices.
        per_pair: of attention, for two tokens of which one attends to the other.
        skips_hidden: whether attention leaves out what its mask hides (flex attention), or else computes all pairs of a row.
            Sequences are packed then: they stand one behind the other in one row.
    """

    per_token: float
    per_pair: float
    skips_hidden: bool = False

    def of(self, rows: int, length: int) -> float:
        """Of rows of ``length`` tokens each, all pairs computed."""
        return rows * (length * self.per_token + length**2 * self.per_pair)

    def shares(self, prompt: int, length: int, response: int) -> bool:
        """Whether a response is less work behind a sequence than behind the prompt alone, in a sequence of its own.

        Attention that skips nothing computes the pairs of two responses too, which do not attend to each other.
        """
        if self.skips_hidden:
            return True
        return self.of(1, length + response) - self.of(1, length) <= self.of(1, prompt + response)
