"""What every sampler offers: fresh weights in; token ids with their log-probabilities out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cppo_lightning.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_tokens: longest response, in tokens.
        temperature: softmax temperature; 0 is greedy (evaluation only).
        top_p: nucleus mass kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: smallest probability kept, relative to the most likely token's; 0 keeps all.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"sampling.max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"sampling.temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k must be at least 0 (0 keeps every token), got {self.top_k}")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"sampling.min_p must be in [0, 1), got {self.min_p}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn, which renormalises mu and biases every ratio."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass
class Completion:
    """One sampled response.  Tensors lie on the CPU; log-probabilities are float32 at the sampling temperature."""

    ids: Tensor  # [t] int64, the end-of-sequence token included when it was drawn
    logp: Tensor  # [t] float32, log mu(y_t | s_t)
    finished: bool  # False when the length limit cut it off
    topk_ids: Tensor | None = None  # [t, K] int64, most likely first
    topk_logp: Tensor | None = None  # [t, K] float32

    def check(self, prompt_id: str) -> None:
        """Raise :class:`RolloutError` unless every token has one finite log-probability."""
        if len(self.logp) != len(self.ids) or (self.topk_logp is not None and len(self.topk_logp) != len(self.ids)):
            raise RolloutError(
                f"prompt {prompt_id!r}: the engine returned {len(self.ids)} tokens with {len(self.logp)} log-probabilities"
                f"{'' if self.topk_logp is None else f' and {len(self.topk_logp)} top-K rows'}; no step was taken on them"
            )
        for name, values in (("log-probability", self.logp), ("top-K log-probability", self.topk_logp)):
            if values is not None and not bool(values.isfinite().all()):
                raise RolloutError(f"prompt {prompt_id!r}: the engine returned a non-finite {name}; no step was taken on it")


OnCompletion = Callable[[int, Completion], None]


class RolloutEngine(ABC):
    """Samples from a causal language model whose weights the trainer renews.

    Constructors only store and validate settings; ``start`` loads the model.

    Attributes:
        concurrent: whether ``generate`` may run in other threads, several at a time, while the policy is trained in this
            process: it changes nothing that belongs to the whole process and reads nothing that ``generate`` elsewhere
            changes.  ``start`` and ``load_weights`` are never called meanwhile.
        max_model_len: longest prompt and response together, in tokens, where the engine is set to less than the model takes.
    """

    concurrent: ClassVar[bool] = False
    max_model_len: int | None = None

    @property
    @abstractmethod
    def max_top_logprobs(self) -> int | None:
        """Largest K that ``generate`` can return, or None when only the vocabulary limits it."""

    @abstractmethod
    def start(self, model: str) -> None:
        """Load ``model`` (a folder or hub id) for sampling.  Called once, before anything else; later calls do nothing."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the trainer's parameters, by Hugging Face name, and forget every cache computed with the old ones."""

    @property
    @abstractmethod
    def version(self) -> int:
        """``version`` of the last ``load_weights`` since ``start``; -1 before the first."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        top_logprobs: int = 0,
        seed: int = 0,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Draw ``n`` responses to each prompt (token ids), prompt-major: ``len(prompts) * n`` completions.

        A function of its arguments and the weights: the same ``seed`` (0 to 2^63 - 1) gives the same tokens again.
        The log-probabilities are those of the distribution actually drawn from, after temperature.

        Args:
            on_completion: called with the place in the result and the completion, once for each, as soon as it has ended and
                while others are still being generated.  Generation waits for it, and it must not draw from global random
                generators.  What it raises ends generation and comes out; the engine can be used again.
        """

    def checksums(self) -> Mapping[str, int] | None:
        """Checksum by Hugging Face name of each parameter as it was last received (``engines.checksums``), after the cast to
        the engine's ``dtype``; None when the engine cannot tell."""
        return None

    def close(self) -> None:
        """Free the model and any child processes.  Safe to call twice."""
