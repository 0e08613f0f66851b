"""avg@16, pass@k and maj@16 on AIME 2024, 2025 and 2026; the CPPO paper reports the first."""

from __future__ import annotations

from cppo_lightning.callbacks.eval_accuracy import EvalAccuracy
from cppo_lightning.prompts import DatasetPrompts, PromptSource


def aime_datasets() -> dict[str, PromptSource]:
    """The 30 problems of each year, from the Hugging Face hub."""
    return {
        "aime24": DatasetPrompts("math-ai/aime24", split="test", answer_key="solution"),  # its "answer" is called solution
        "aime25": DatasetPrompts("math-ai/aime25", split="test"),
        "aime26": DatasetPrompts("math-ai/aime26", split="test"),
    }


class AIMEAccuracy(EvalAccuracy):
    """:class:`EvalAccuracy` with the three AIME sets: ``eval/aime24/avg@16`` and so on, their unweighted mean ``eval/avg@16``.

    Args:
        datasets: problems by the set's name; None takes AIME 2024, 2025 and 2026 from the Hugging Face hub.
        every_n_rollouts: rollouts between two evaluations.
        samples: n, responses to each problem.
        temperature: sampling temperature.
        top_p: nucleus mass kept.
        max_tokens: longest response; None takes the training rollouts' limit.
        at_start: evaluate before the first rollout.
        at_end: evaluate after the last one, whatever ``every_n_rollouts``.
        batch_problems: problems per call of the engine and rank; None samples as many responses at once as a rollout has.
    """

    def __init__(
        self,
        datasets: dict[str, PromptSource] | None = None,
        every_n_rollouts: int = 20,
        samples: int = 16,
        temperature: float = 0.7,
        top_p: float = 0.95,
        max_tokens: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        batch_problems: int | None = None,
    ) -> None:
        chosen = aime_datasets() if datasets is None else datasets
        super().__init__(chosen, every_n_rollouts, samples, temperature, top_p, max_tokens, at_start, at_end, batch_problems)
