"""Where the pull of each trust region goes in answers to chains: to slips, or to right steps before and behind them.

    python -m benchmarks.comparison.slips build/recorded/cppo --rollouts 0

``RolloutRecorder`` has written the recording.  A step is right if it follows from the value written before it, be that wrong
or not.  How hard a token is pulled, ``weight * |A| * (1 - pi)``, is how far the gradient would move its logit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.comparison.grid import REPOSITORY
from benchmarks.comparison.tables import markdown
from cppo_lightning.chain_model import chain_tokenizer
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts.chain_prompts import OPERATORS
from cppo_lightning.replay.reading import read
from cppo_lightning.replay.regions import load_region
from cppo_lightning.replay.replaying import Asked
from cppo_lightning.replay.run_card import parts_of, read_card

if TYPE_CHECKING:
    from torch import Tensor

    from cppo_lightning.replay.layout import Recorded

TABLE = ("none", "ppo", "grpo", "cispo", "minpro", "dppo", "trm_max", "trm_avg", "cppo")


class Step(Enum):
    """What a token of an answer is."""

    BEFORE = "right, before a slip"
    SLIP = "slip"
    BEHIND = "right, behind a slip"
    REST = "between values"


def steps_of(chain: str, answer: Sequence[str]) -> list[Step]:
    """What each character of ``answer`` is; ``REST`` for what stands where a value should, but is no digit or one too many.

    Args:
        chain: as it was asked, such as ``7+5*3=7,``.
        answer: its tokens, one for each character.
    """
    formula, _, _ = chain.partition("=")
    operations = list(zip(formula[1::2], formula[2::2], strict=True))
    value, good, steps = int(formula[0]), Step.BEFORE, list[Step]()
    for place, character in enumerate(answer):
        if place % 2 or place // 2 >= len(operations) or not character.isdecimal():
            steps.append(Step.REST)
            continue
        sign, operand = operations[place // 2]
        right = int(character) == OPERATORS[sign](value, int(operand)) % 10
        steps.append(good if right else Step.SLIP)
        value, good = int(character), good if right else Step.BEHIND
    return steps


@dataclass
class Pull:
    """Of tokens of one kind, on answers of one sign of the advantage."""

    tokens: int = 0
    probability: float = 0.0  # summed, under the rollout policy
    by_region: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


Pulls = Mapping[tuple[bool, Step], Pull]


def pulls(recording: Path, configs: Sequence[Path], rollouts: Sequence[int] | None = None) -> Pulls:
    """Sums over a recording, by whether A > 0 and what a token is; tokens with A = 0 are left out.

    Args:
        configs: YAML files with ``model.trust_region``; a file's stem is its name.
        rollouts: numbers of those to look at; None: all.

    Raises:
        ConfigError: a file that cannot be read, two of one name, a prompt that is no chain, or a rollout that is not in the
            recording.
    """
    names = [file.stem for file in configs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--config: {twice[0]!r} is the name of {names.count(twice[0])} files; give each one of its own")
    asked, parts = Asked(read_card(recording), {file.stem: load_region(file) for file in configs}), parts_of(recording)
    found: defaultdict[tuple[bool, Step], Pull] = defaultdict(Pull)
    seen = set[int]()
    files = [path for paths in parts.values() for path in paths]
    for path in track(files, "tokens under each trust region", console=Console(stderr=True)):
        for recorded in read(path):
            if rollouts is None or recorded.place.rollout in rollouts:
                seen.add(recorded.place.rollout)
                _add(found, recorded, asked)
    if missing := sorted(set(rollouts or ()) - seen):
        raise ConfigError(f"--rollouts {missing[0]}: {str(recording)!r} has no such rollout")
    return found


def _add(found: Mapping[tuple[bool, Step], Pull], recorded: Recorded, asked: Asked) -> None:
    stats, gates = recorded.stats, asked.gates(recorded)
    reach = stats.advantages.abs() * -torch.expm1(stats.logp)
    kinds = _kinds(recorded)
    for up in (True, False):
        chosen = stats.mask & (stats.advantages > 0 if up else stats.advantages < 0)
        for number, step in enumerate(Step):
            of_kind = chosen & (kinds == number)
            pull = found[up, step]
            pull.tokens += int(of_kind.sum())
            pull.probability += float(stats.rollout_logp[of_kind].double().exp().sum())
            for name, gate in gates.items():
                pull.by_region[name] += float((gate.weight * reach)[of_kind].double().sum())


def _kinds(recorded: Recorded) -> Tensor:
    """``[B, T]``: a token's place in ``Step``."""
    batch, numbers = recorded.batch, {step: number for number, step in enumerate(Step)}
    names = {token: name for name, token in chain_tokenizer().get_vocab().items()}
    kinds = torch.full(batch.response_ids.shape, numbers[Step.REST])
    for row, (prompt, answer) in enumerate(zip(batch.prompt_ids, batch.response_ids, strict=True)):
        asked = [names.get(token, "") for token in prompt[batch.prompt_mask[row]].tolist()]
        written = [names.get(token, "") for token in answer[batch.response_mask[row]].tolist()]
        chain = "".join(name for name in asked if len(name) == 1)  # special tokens have longer names
        if not re.fullmatch(r"\d([-+*]\d)+=\d,", chain):
            raise ConfigError(f"recording: a prompt reads {chain!r}; take a run of configs/chain, whose prompts are chains")
        kinds[row][batch.response_mask[row]] = torch.tensor([numbers[step] for step in steps_of(chain, written)])
    return kinds


def table(found: Pulls, regions: Sequence[str]) -> str:
    """Markdown: shares of all that is pulled at under the first trust region, by kind of token where A < 0, and where A > 0.

    Raises:
        ConfigError: that one pulls at nothing.
    """
    whole = sum(pull.by_region[regions[0]] for pull in found.values())
    if not whole:
        raise ConfigError(f"{regions[0]} pulls at no token there, so that there are no shares of it; take other --rollouts")
    columns = {f"A < 0: {step.value}": [found[False, step]] for step in Step} | {"A > 0": [found[True, step] for step in Step]}
    tokens = [sum(pull.tokens for pull in of) for of in columns.values()]
    likely = [sum(pull.probability for pull in of) for of in columns.values()]
    rows = [
        ["tokens, each pass counted", *(f"{count:,}" for count in tokens)],
        ["mean probability when sampled", *(f"{total / max(n, 1):.3f}" for total, n in zip(likely, tokens, strict=True))],
    ]
    for region in regions:
        shares = [sum(pull.by_region[region] for pull in of) / whole for of in columns.values()]
        rows.append([region, *(f"{share:.1%}" for share in shares)])
    return markdown(["", *columns], rows)


def parser() -> argparse.ArgumentParser:
    """Of the command."""
    made = argparse.ArgumentParser("python -m benchmarks.comparison.slips", description="Where the pull on chains goes.")
    made.add_argument("recording", type=Path, help="folder that RolloutRecorder has written, of a run on chains")
    made.add_argument("--config", type=Path, action="append", help="a trust region; if left out, those of the paper's table")
    made.add_argument("--rollouts", type=int, nargs="+", help="only these, from 0")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    configs = options.config or [REPOSITORY / "configs" / "trust_region" / f"{name}.yaml" for name in TABLE]
    try:
        print(table(pulls(options.recording, configs, options.rollouts), [file.stem for file in configs]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
