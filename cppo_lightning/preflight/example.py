"""A problem as the model will see it, and what the run's verifier says of its gold answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from cppo_lightning.preflight.section import Row, Section, number
from cppo_lightning.verifiers.base import Outcome, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cppo_lightning.rollout import Sampler
    from cppo_lightning.verifiers import Problem

# ways to give an answer that the verifiers here read, and none
_RESPONSES = ("{}", "\\boxed{{{}}}", "Answer: {}", "<answer>{}</answer>", "")


def example_section(sampler: Sampler, problem: Problem) -> Section:
    """The prompt after template and tokenizer, and the verdicts of the run's own pool.

    Raises:
        ConfigError: the verifier cannot be loaded.
    """
    ids = sampler.template.encode(sampler.tokenizer, problem)
    responses = [way.format(problem.answer) for way in _RESPONSES]
    verdicts = sampler.pool.judge([(problem, response) for response in responses])
    rows: list[Row] = [
        ("problem", problem.id, problem.source),
        ("prompt", f"{number(len(ids))} tokens", f"special tokens marked; the first ids are {ids[:8]}"),
        ("gold answer", problem.answer, problem.dataset),
    ]
    rows += [
        (f"verdict on {response!r}" if response else "verdict on an empty answer", f"{verdict.outcome}", _details(verdict))
        for response, verdict in zip(responses, verdicts, strict=True)
    ]
    verifier = type(sampler.pool.verifier).__name__
    warnings = []
    if not any(verdict.outcome is Outcome.CORRECT for verdict in verdicts[:-1]):
        tried = ", ".join(f"{response!r}" for response in responses[:-1])
        warnings.append(f"{verifier} finds the gold answer right in none of {tried}; does the prompt say which form it wants?")
    if verdicts[-1].outcome is Outcome.CORRECT:
        warnings.append(f"{verifier} finds an empty answer right")
    return Section("A problem", rows, warnings, Panel(marked(sampler.tokenizer, ids), title="prompt", title_align="left"))


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Text:
    """The text of ``ids``, with special tokens shown and in reverse video."""
    text = Text(str(tokenizer.decode(ids, skip_special_tokens=False)))
    special = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
    if special:
        text.highlight_regex(re.compile("|".join(map(re.escape, special))), style="reverse")
    return text


def _details(verdict: Verdict) -> str:
    parts = [f"reward {verdict.reward:g}"]
    parts += [f"read as {verdict.extracted!r}"] if verdict.extracted is not None else []
    parts += [f"{name} {reward:g}" for name, reward in verdict.parts.items()]
    return ", ".join([*parts, *([verdict.detail] if verdict.detail else [])])
