"""What is evaluated, and the loop that samples and judges it: in training, in ``validate``, ``test`` and ``predict`` alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cppo_lightning.engines.engine import Sampling
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.prompt_source import PromptSource
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.verifiers.base import Outcome

if TYPE_CHECKING:
    from cppo_lightning.rollout.sampler import Sampler
    from cppo_lightning.verifiers.base import Problem


@dataclass(frozen=True)
class Evaluation:
    """What ``validate``, ``test`` and ``predict`` sample and judge: the problems of one set or of several.

    Args:
        prompts: the problems of a single set, which is called ``evaluation``; null where ``datasets`` names sets.
        samples: responses to each problem.
        sampling: how they are drawn; the paper evaluates at temperature 0.7 and top-p 0.95.
        batch_prompts: problems sampled at a time, on each rank.
        datasets: problems by the set's name; null where ``prompts`` is given.

    Raises:
        ConfigError: not exactly one of ``prompts`` and ``datasets``, a name that cannot be a folder's, a number below 1, or
            several samples at temperature 0.
    """

    prompts: PromptSource | None = None
    samples: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.95))
    batch_prompts: int = 64
    datasets: dict[str, PromptSource] | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) is (self.datasets is None):
            given = "neither is" if self.prompts is None else "both are"
            raise ConfigError(
                f"data.evaluation takes its problems from prompts (one set) or datasets (sets by name), and {given} given; "
                "set one of them, and the other to null"
            )
        check_sets("data.evaluation", self.sets)
        check_counts("data.evaluation", {"samples": self.samples, "batch_prompts": self.batch_prompts})
        check_temperature("data.evaluation", self.sampling.temperature, self.samples)

    @property
    def sets(self) -> dict[str, PromptSource]:
        """The sources by the set's name."""
        return {"evaluation": self.prompts} if self.prompts is not None else self.datasets or {}


def check_sets(key: str, sets: Mapping[str, PromptSource]) -> None:
    """Raise :class:`ConfigError` unless there are sets, each with a name that tags and folders can have."""
    if not sets or any(not name or name.startswith(".") or "/" in name for name in sets):
        raise ConfigError(f"{key}.datasets must name at least one set, without '/' and no '.' first, got {list(sets)}")


def check_counts(key: str, counts: Mapping[str, int | None]) -> None:
    """Raise :class:`ConfigError` for a number below 1; None is allowed."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}.{name} must be at least 1, got {value}")


def check_temperature(key: str, temperature: float, samples: int) -> None:
    """Raise :class:`ConfigError` for several samples without chance."""
    if temperature == 0 and samples > 1:
        raise ConfigError(f"{key}.samples must be 1 at temperature 0 (all would be equal), got {samples}")


class EvaluationBatch:
    """Judged samples of some problems of one set; possibly of none, on a rank with fewer problems than another.

    No dataclass: Lightning's precision plugins would convert the tensors in one, and refuse a frozen one.

    Args:
        name: of the set.
        numbers: places of the problems in the set.
        rollout: their samples.
        step: optimizer steps that the sampling weights had seen.
    """

    def __init__(self, name: str, numbers: Sequence[int], rollout: Rollout, step: int) -> None:
        self.name = name
        self.numbers = numbers
        self.rollout = rollout
        self.step = step

    def rows(self) -> list[dict[str, Any]]:
        """A row per response: what :meth:`Sample.row` says, with set, number of the problem and of the sample, and step."""
        return [
            {"set": self.name, "number": number, "sample": i, **sample.row(), "step": self.step}
            for number, group in zip(self.numbers, self.rollout.groups(), strict=True)
            for i, sample in enumerate(group)
        ]

    def means(self, stage: str) -> dict[str, float]:
        """Accuracy, reward and truncated share of the samples as ``<stage>/accuracy`` and so on; 0 without samples."""
        samples = self.rollout.samples
        sums = {
            "accuracy": sum(s.verdict.outcome is Outcome.CORRECT for s in samples),
            "reward": sum(s.verdict.reward for s in samples),
            "truncated_share": sum(not s.completion.finished for s in samples),
        }
        return {f"{stage}/{name}": value / max(len(samples), 1) for name, value in sums.items()}


class Samples(Protocol):
    """What the loop uses of the datamodule."""

    @property
    def sampler(self) -> Sampler: ...

    def sync_weights(self) -> None: ...

    def draw_seed(self, *purpose: str | int) -> int: ...


class EvaluationStream:
    """Judged samples of a rank's part of each set's problems, ``batch_prompts`` problems at a time, one set after the other.

    Every rank gives as many batches, the last ones of a set without samples where its part is smaller: each takes part in
    collectives, and Lightning passes over a loader without any.  What is drawn follows from the run's seed, the rank, the set,
    the step and the place in the set: a callback and ``validate`` with the same weights and settings get the same answers.

    Args:
        sets: the problems of all ranks, by the set's name.
        evaluation: how they are sampled.
        ranks: this rank's number, and how many there are.
        step: optimizer steps that the weights have seen.
        data: samples; it is told to hand over the current weights when the loop begins.
        tell: called before each batch with the set's name, the problems done and this rank's problems in it.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Problem]],
        evaluation: Evaluation,
        ranks: tuple[int, int],
        step: int,
        data: Samples,
        tell: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> None:
        self.sets = sets
        self.evaluation = evaluation
        self.rank, self.count = ranks
        self.step = step
        self.data = data
        self.tell = tell

    def __len__(self) -> int:
        return sum(len(self._places(problems)) for problems in self.sets.values())

    def __iter__(self) -> Iterator[EvaluationBatch]:
        self.data.sync_weights()
        for name, problems in self.sets.items():
            numbers = range(len(problems))[self.rank :: self.count]
            for place in self._places(problems):
                some = numbers[place : place + self.evaluation.batch_prompts]
                if some:
                    self.tell(name, place, len(numbers))
                rollout = self._sample(name, [problems[number] for number in some], place)
                yield EvaluationBatch(name, some, rollout, self.step)

    def _places(self, problems: Sequence[Problem]) -> range:
        """Where batches begin in the largest part that any rank has."""
        return range(0, -(-len(problems) // self.count), self.evaluation.batch_prompts)

    def _sample(self, name: str, problems: Sequence[Problem], place: int) -> Rollout:
        evaluation = self.evaluation
        if not problems:
            return Rollout([], evaluation.samples, self.step, 0.0, 0.0)
        seed = self.data.draw_seed("eval", name, self.step, place)
        return self.data.sampler.sample(problems, evaluation.samples, evaluation.sampling, seed=seed)
