"""A penalty on long responses, added to the verifier's reward before advantages are computed."""

from __future__ import annotations

from dataclasses import dataclass

from cppo_lightning.errors import ConfigError


@dataclass(frozen=True)
class Overlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13), added to the reward of a response of n tokens::

        0                                              n <= max_tokens - buffer
        factor * ((max_tokens - buffer) - n) / buffer  in between
        -factor                                        n >= max_tokens

    A response that ``data.sampling.max_tokens`` cut off has at least ``max_tokens`` tokens and gets the full penalty.

    Args:
        max_tokens: length from which the penalty is full, at most ``data.sampling.max_tokens`` (DAPO: 20480).
        buffer: tokens over which it grows (DAPO: 4096, a fifth of ``max_tokens``; scale it with shorter responses).
        factor: the full penalty, in units of reward.

    Raises:
        ConfigError: a value outside its range.
    """

    max_tokens: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"Overlong.max_tokens must be at least 1 token, got {self.max_tokens}")
        if not 1 <= self.buffer <= self.max_tokens:
            raise ConfigError(
                f"Overlong.buffer must be between 1 and max_tokens = {self.max_tokens} (usual: a fifth of it), "
                f"got {self.buffer}"
            )
        if self.factor <= 0:
            raise ConfigError(f"Overlong.factor must be above 0, got {self.factor}; for none set data.overlong: null")

    def __call__(self, length: int) -> float:
        """Penalty of a response of ``length`` tokens, between ``-factor`` and 0."""
        excess = (length - (self.max_tokens - self.buffer)) / self.buffer
        return -self.factor * min(max(excess, 0.0), 1.0)
