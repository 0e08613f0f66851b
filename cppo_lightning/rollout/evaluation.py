"""What ``validate``, ``test`` and ``predict`` sample and judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.rollout.sampler import Rollout

if TYPE_CHECKING:
    from cppo_lightning.verifiers.base import Problem


@dataclass(frozen=True)
class Evaluation:
    """What ``validate``, ``test`` and ``predict`` sample and judge.

    Args:
        prompts: the problems.
        samples: responses to each problem.
        sampling: how they are drawn; the paper evaluates at temperature 0.7 and top-p 0.95.
        batch_prompts: problems sampled at a time.
    """

    prompts: PromptSource
    samples: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.95))
    batch_prompts: int = 64

    def __post_init__(self) -> None:
        for name in ("samples", "batch_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.evaluation.{name} must be at least 1, got {getattr(self, name)}")


class EvaluationStream:
    """Judged samples of a rank's part of an evaluation's problems, ``batch_prompts`` problems at a time.

    Every rank gives as many rollouts, the last ones without samples where its part is smaller: each takes part in collectives,
    and Lightning passes over a loader without any.

    Args:
        problems: of all ranks.
        batch_prompts: problems per rollout.
        ranks: this rank's number, and how many there are.
        sample: samples and judges some problems, possibly none, given the place of the first.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        batch_prompts: int,
        ranks: tuple[int, int],
        sample: Callable[[Sequence[Problem], int], Rollout],
    ) -> None:
        rank, count = ranks
        self.problems = problems[rank::count]
        self.most = len(problems[::count])  # that any rank has
        self.batch_prompts = batch_prompts
        self.sample = sample

    def __len__(self) -> int:
        return -(-self.most // self.batch_prompts)

    def __iter__(self) -> Iterator[Rollout]:
        for place in range(0, self.most, self.batch_prompts):
            yield self.sample(self.problems[place : place + self.batch_prompts], place)
