"""What a run trains on and what it is evaluated on: read, judged fit, measured and compared before any model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Literal

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.bad_rows import BadRows, LoadCounts
from cppo_lightning.prompts.contamination import Overlap, TrainingTexts
from cppo_lightning.prompts.fingerprint import fingerprint
from cppo_lightning.prompts.prompt_source import PromptSource, check_problems
from cppo_lightning.ranks import on_every_rank
from cppo_lightning.rollout.settings import check_same_on_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from cppo_lightning.engines.engine import RolloutEngine
    from cppo_lightning.rollout.sampler import Sampler
    from cppo_lightning.verifiers.base import Problem

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataRules:
    """What happens to data that should not be used.

    Args:
        on_bad_row: ``raise`` stops at the first row that cannot be used, in any set; ``skip`` counts them.
        on_contamination: ``report`` or ``raise`` when evaluation problems are among the training problems.
        max_prompt_tokens: longer training prompts are dropped and counted; None for what the context leaves.

    Raises:
        ConfigError: another word, or a number below 1.
    """

    on_bad_row: Literal["raise", "skip"] = "raise"
    on_contamination: Literal["report", "raise"] = "report"
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, words in (("on_bad_row", ("raise", "skip")), ("on_contamination", ("report", "raise"))):
            if getattr(self, name) not in words:
                raise ConfigError(f"data.{name} must be {' or '.join(words)}, got {getattr(self, name)!r}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"data.max_prompt_tokens must be at least 1 or null, got {self.max_prompt_tokens}")


@dataclass
class ProblemSet:
    """Problems as they are used, and what became of the rows that they were read from."""

    names: list[str]  # several, where callbacks and the datamodule evaluate on the same problems
    problems: Sequence[Problem]
    fingerprint: str
    counts: LoadCounts
    bad: str  # why rows are bad, empty if none is
    too_long: int = 0  # problems dropped for the length of their prompts
    overlaps: Sequence[Overlap] = ()  # with the training set
    prompt_tokens: Sequence[int] = ()  # of each problem, where it is trained on

    @property
    def name(self) -> str:
        return ", ".join(self.names)


class ProblemSets:
    """The training set and the evaluation sets of one run.

    Args:
        sampler: its template, tokenizer and verifiers decide whether a problem can be used.
        rules: what happens to data that should not be used.
        context: longest prompt and response together, in tokens; None where nothing limits it.
        speaks: whether to warn of what is dropped and found (on one rank).
    """

    def __init__(self, sampler: Sampler, rules: DataRules, context: int | None, speaks: bool = True) -> None:
        self.sampler = sampler
        self.rules = rules
        self.context = context
        self.speaks = speaks
        self.training: ProblemSet | None = None
        self.evaluations: dict[str, ProblemSet] = {}  # by fingerprint
        self._texts: TrainingTexts | None = None

    def load_training(self, source: PromptSource, max_tokens: int) -> ProblemSet:
        """Read what is trained on; responses have up to ``max_tokens`` tokens.  Every rank must call it.

        Raises:
            ConfigError: rows that cannot be used, no problem that can, or other problems than on another rank.
        """
        longest = self._longest(max_tokens)
        problems, rows = self._read(source)
        lengths = self._lengths(problems)
        fits = [longest is None or length <= longest for length in lengths]
        kept = list(compress(problems, fits))
        if not kept:
            raise ConfigError(
                f"data.prompts: all {len(problems)} prompts have more than {longest} tokens, the shortest {min(lengths)}; "
                "raise data.max_prompt_tokens, or lower data.sampling.max_tokens where the context is the limit"
            )
        found = fingerprint(kept, self.sampler.template, source.shares())
        check_same_on_ranks(on_every_rank(found))
        dropped = len(problems) - len(kept)
        lengths = list(compress(lengths, fits))
        self.training = ProblemSet(["training"], kept, found, rows.counts, rows.summary(), dropped, prompt_tokens=lengths)
        self._texts = TrainingTexts(kept)
        self._tell(self.training, longest)
        return self.training

    def load_evaluation(self, name: str, source: PromptSource, max_tokens: int) -> ProblemSet:
        """Read a set to evaluate on, and compare it with the training set where there is one.

        Raises:
            ConfigError: rows that cannot be used, a prompt that is too long (none is dropped: the accuracy would be another),
                two sets of one name, or, where the rules say so, problems that are trained on.
        """
        problems, rows = self._read(source)
        for problem, length in zip(problems, self._lengths(problems), strict=True):
            if self.context is not None and length + max_tokens > self.context:
                way_out = (
                    f"lower its max_tokens to {self.context - length}" if length < self.context else "take the problem out"
                )
                raise ConfigError(
                    f"problem {problem.id!r} ({problem.source or 'no source given'}) of the evaluation set {name!r} has "
                    f"{length} tokens, which with max_tokens {max_tokens} exceed the context of {self.context}; {way_out}"
                )
        found = fingerprint(problems, self.sampler.template)
        if any(name in known.names for key, known in self.evaluations.items() if key != found):
            raise ConfigError(f"two evaluation sets are called {name!r} and have other problems; rename one of them")
        known = self.evaluations.get(found)
        if known is not None:
            known.names += [name] if name not in known.names else []
            return known
        loaded = self.evaluations[found] = ProblemSet([name], problems, found, rows.counts, rows.summary())
        self._tell(loaded, None)
        if self._texts is not None:
            loaded.overlaps = self._texts.overlaps(problems)
            self._warn_of(loaded)
        return loaded

    def _read(self, source: PromptSource) -> tuple[list[Problem], BadRows]:
        rows = BadRows(self.rules.on_bad_row == "skip")
        return check_problems(source.load(rows), self.sampler.pool, rows), rows

    def _lengths(self, problems: Sequence[Problem]) -> list[int]:
        """Tokens of each prompt; only these are kept, for encoding a rollout's few prompts again costs nothing."""
        return [len(self.sampler.template.encode(self.sampler.tokenizer, problem)) for problem in problems]

    def _longest(self, max_tokens: int) -> int | None:
        """Tokens that a training prompt may have."""
        wanted = self.rules.max_prompt_tokens
        if self.context is None:
            return wanted
        room = self.context - max_tokens
        if room < 1:
            raise ConfigError(
                f"data.sampling.max_tokens = {max_tokens} leaves no room for a prompt in the context of {self.context} tokens"
            )
        if wanted is not None and wanted > room:
            raise ConfigError(
                f"data.max_prompt_tokens = {wanted} with data.sampling.max_tokens = {max_tokens} exceeds the context of "
                f"{self.context} tokens; take at most {room}"
            )
        return room if wanted is None else wanted

    def _tell(self, loaded: ProblemSet, longest: int | None) -> None:
        counts = loaded.counts
        parts = [
            (counts.repeated, "repeated"),
            (counts.conflicting, "with conflicting answers"),
            (counts.bad, f"bad ({loaded.bad})"),
            (loaded.too_long, f"with prompts of more than {longest} tokens"),
        ]
        dropped = ", ".join(f"{number} {what}" for number, what in parts if number)
        if self.speaks and dropped:
            # a repeated row loses nothing, and data sets that are drawn or published a hundred times are full of them
            level = logging.WARNING if any(number for number, _ in parts[1:]) else logging.INFO
            _LOG.log(level, "%s: %d problems; left out: %s", loaded.name, len(loaded.problems), dropped)

    def _warn_of(self, evaluation: ProblemSet) -> None:
        if not evaluation.overlaps:
            return
        message = f"{evaluation.name}: {overlaps_in_words(evaluation)}"
        if self.rules.on_contamination == "raise":
            raise ConfigError(f"{message}; take them out of data.prompts, or set data.on_contamination: report")
        if self.speaks:
            _LOG.warning("%s", message)


def context_length(config: PretrainedConfig, engine: RolloutEngine) -> int | None:
    """Longest prompt and response together, in tokens, that the model and the engine take; None where neither says."""
    limits = [getattr(config, "max_position_embeddings", None), engine.max_model_len]
    return min((limit for limit in limits if limit is not None), default=None)


def overlaps_in_words(evaluation: ProblemSet, most: int = 3) -> str:
    """How many problems of an evaluation set match training problems, and the ids of the first pairs (``~``: nearly)."""
    overlaps, size = evaluation.overlaps, len(evaluation.problems)
    exact = {overlap.evaluation for overlap in overlaps if overlap.exact}
    near = {overlap.evaluation for overlap in overlaps} - exact
    if not overlaps:
        return f"none of its {size} problems is in the training set"
    # the ids are the data's, and go to terminals
    pairs = ", ".join(f"{o.evaluation!r} {'=' if o.exact else '~'} {o.training!r}" for o in overlaps[:most])
    rest = ", ..." if len(overlaps) > most else ""
    return f"of its {size} problems, {len(exact)} match training problems exactly and {len(near)} nearly: {pairs}{rest}"
