"""The batch arithmetic: from prompts and samples to micro-batches and optimizer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cppo_lightning.preflight.section import Row, Section, number, plural

if TYPE_CHECKING:
    from cppo_lightning.rollout import RolloutPlan


@dataclass(frozen=True)
class Batches:
    """A run's sizes.

    Args:
        plan: prompts, samples and updates of a rollout.
        ranks: that train on batches of their own.
        prompt_tokens: of each training problem.
        max_tokens: longest response, in tokens.
        micro_batch_tokens: padded tokens in one forward pass.
        context: longest prompt and response together, in tokens; None where nothing limits it.
        rollouts: in the whole run; None where the run ends by time or not at all.
        steps: optimizer steps at which the run ends, where it is told to; None otherwise.
    """

    plan: RolloutPlan
    ranks: int
    prompt_tokens: Sequence[int]
    max_tokens: int
    micro_batch_tokens: int
    context: int | None
    rollouts: int | None
    steps: int | None = None

    @property
    def responses(self) -> int:
        """In a rollout, of all ranks."""
        return self.plan.prompts * self.plan.samples

    @property
    def responses_per_update(self) -> int:
        """Of one rank."""
        return self.responses // self.plan.updates // self.ranks

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return max(self.prompt_tokens) + self.max_tokens

    @property
    def micro_batch(self) -> int:
        """Most padded tokens that one forward pass can have: one response is never cut, and a rank may have few of them."""
        return max(self.longest, min(self.micro_batch_tokens, self.responses_per_update * self.longest))

    @property
    def optimizer_steps(self) -> int | None:
        """In the whole run, if no rollout is skipped; None where the run ends by time or not at all."""
        ends = [end for end in (self.rollouts and self.rollouts * self.plan.steps, self.steps) if end is not None]
        return min(ends, default=None)

    def micro_batches(self, response: int) -> int:
        """Of one rank in one update, if every response has that many tokens and a prompt of its own, of the median length."""
        rows = max(1, self.micro_batch_tokens // (round(statistics.median(self.prompt_tokens)) + response))
        return math.ceil(self.responses_per_update / rows)

    def section(self) -> Section:
        return Section("Batches", [*self._of_a_rollout(), *self._of_the_run()], self._warnings())

    def _of_a_rollout(self) -> list[Row]:
        plan, half = self.plan, max(1, self.max_tokens // 2)
        per_update = self.responses // plan.updates
        rows: list[Row] = [
            ("responses per rollout", number(self.responses), f"{plan.prompts} prompts x {plan.samples} samples"),
            (
                "optimizer steps per rollout",
                number(plan.steps),
                f"{f'{plan.passes} passes of {plan.updates}, ' if plan.passes > 1 else ''}fewer where rewards are all equal",
            ),
            (
                "groups per step",
                number(plan.prompts // plan.updates),
                f"= {number(per_update)} responses, of at most {number(per_update * self.max_tokens)} tokens",
            ),
            ("responses per rank and step", number(self.responses_per_update), f"on {plural(self.ranks, 'rank')}"),
            (
                "micro-batches per rank and step",
                " to ".join(map(number, sorted({self.micro_batches(half), self.micro_batches(self.max_tokens)}))),
                f"{number(self.micro_batch_tokens)} padded tokens each; responses of {number(half)} to "
                f"{number(self.max_tokens)} tokens, prompt of median length; fewer where responses share it",
            ),
            (
                "longest sequence",
                f"{number(self.longest)} tokens",
                f"prompt {number(max(self.prompt_tokens))} (median {number(statistics.median(self.prompt_tokens))}) + response "
                f"{number(self.max_tokens)}; context {'unlimited' if self.context is None else number(self.context)}",
            ),
        ]
        if plan.max_refills:
            most = f"at most {number(plan.prompts * (1 + plan.max_refills))}"
            rows.append(("prompts drawn per rollout", most, f"{plan.max_refills} refills of groups that are all equal"))
        return rows

    def _of_the_run(self) -> list[Row]:
        plan, steps = self.plan, self.optimizer_steps
        return [
            (
                "optimizer steps in all",
                "without end" if steps is None else number(steps),
                "no max_epochs, no max_steps" if steps is None else f"{number(steps / plan.steps)} rollouts",
            ),
            (
                "age of a sample",
                f"at most {plural(plan.steps * (1 + plan.max_staleness) - 1, 'step')}",
                "steps per rollout x (1 + max_staleness) - 1; an older batch stops the run",
            ),
            (
                "one pass over the problems",
                plural(math.ceil(len(self.prompt_tokens) / plan.prompts), "rollout"),
                f"{number(len(self.prompt_tokens))} problems, {plan.prompts} a rollout{self._passes(steps)}",
            ),
        ]

    def _passes(self, steps: int | None) -> str:
        if steps is None:
            return ""
        return f"; the run makes {steps / self.plan.steps * self.plan.prompts / len(self.prompt_tokens):.2f} passes"

    def _warnings(self) -> list[str]:
        warnings = []
        if self.longest > self.micro_batch_tokens:
            warnings.append(
                f"a response of full length has {number(self.longest)} tokens with its prompt and gets a forward pass of its "
                f"own, with more memory than model.micro_batch_tokens = {number(self.micro_batch_tokens)} would take"
            )
        if len(self.prompt_tokens) < self.plan.prompts:
            warnings.append(
                f"there are {len(self.prompt_tokens)} problems for {self.plan.prompts} prompts a rollout: some come twice in it"
            )
        return warnings
