"""A replay in the terminal, as pictures and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cppo_lightning.replay.layout import Place
from cppo_lightning.untrusted import whole_file

if TYPE_CHECKING:
    from rich.console import Console

    from cppo_lightning.replay.comparison import Comparison
    from cppo_lightning.replay.replaying import Replay
    from cppo_lightning.replay.samples import SampleView

NUMBERS = "replay.json"


def write_numbers(replay: Replay, folder: Path) -> Path:
    """All numbers as JSON; what is not finite is null."""
    with whole_file(folder / NUMBERS) as file:
        file.write((json.dumps(_plain(asdict(replay)), indent=1, allow_nan=False) + "\n").encode())
    return folder / NUMBERS


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Place):
        return value._asdict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Pictures of it as PNG files."""
    from cppo_lightning.figures.numbers import RegionsAgreement, RegionsByPosition
    from cppo_lightning.figures.replay import draw_agreement, draw_gradient_by_position, draw_kept_by_position
    from cppo_lightning.figures.style import to_png

    names, regions = tuple(comparison.regions), comparison.regions.values()
    note = f"{comparison.tokens:,} tokens of {comparison.responses:,} recorded responses"
    kept = np.array([region.kept_at for region in regions], dtype=np.float64)
    gradient = np.array([region.gradient_at for region in regions], dtype=np.float64)
    both = RegionsAgreement(names, np.array(comparison.alike), np.array(comparison.dropped, dtype=np.float64), note)
    figures = {
        "kept_by_position": draw_kept_by_position(RegionsByPosition(names, kept, note)),
        "gradient_by_position": draw_gradient_by_position(RegionsByPosition(names, gradient, note)),
        "agreement": draw_agreement(both),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        to_png(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def show(replay: Replay, console: Console) -> None:
    """Tables of it."""
    comparison = replay.comparison
    steps = [update.step for update in comparison.updates]
    console.print(
        f"{comparison.tokens:,} tokens of {comparison.responses:,} responses, {len(steps)} updates from step {min(steps)} to "
        f"{max(steps)}; top-K of mu: {replay.card.top_k or 'none'}"
    )
    console.print(_regions(comparison))
    if len(comparison.regions) > 1:
        console.print(_agreement(comparison))
    console.print(_about_the_own(replay))
    if replay.sample is not None:
        console.print(_sample(replay.sample))


def _about_the_own(replay: Replay) -> Text:
    own, again = replay.card.trust_region.get("class_path"), replay.again
    if again is None:
        return _text(f"The run's own {own} is not part of cppo_lightning: name its file with --config to ask it again.")
    if again.unlike_the_run == again.other_weights == 0:
        return _text(f"The run's own {own}, asked again, decides as recorded: every decision and, bit by bit, every weight.")
    return _text(
        f"The run's own {own}, asked again, decides {again.unlike_the_run} tokens otherwise and gives {again.other_weights} "
        f"of {replay.comparison.tokens} another weight: another device, or other versions, round otherwise."
    )


def _regions(comparison: Comparison) -> Table:
    headings = ("dropped", "position", "budget", "1st half", "2nd half", "pull", "unlike")
    table = _table("What each trust region does with them", "trust region", headings)
    table.caption = (
        "dropped: share of the tokens, by cause where it is told; halves: kept there; pull: mean of weight |A| per token; "
        "unlike: tokens decided otherwise than in the run"
    )
    for name, region in comparison.regions.items():
        shares = (region.dropped, region.by_position, region.by_budget, *region.kept_in_halves)
        table.add_row(_text(name), *map(_share, shares), f"{region.gradient:.4g}", f"{region.unlike_the_run:,}")
    return table


def _agreement(comparison: Comparison) -> Table:
    table = _table("Share of the tokens that both keep or both drop", "", list(comparison.regions))
    for name, row in zip(comparison.regions, comparison.alike, strict=True):
        table.add_row(_text(name), *map(_share, row))
    return table


def _table(title: str, first: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=_text(title), title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(_text(heading), justify="right", overflow="fold")
    return table


def _sample(sample: SampleView) -> Table:
    title = (
        f"{sample.problem}: reward {sample.reward:g}, advantage {sample.advantage:+.3f}, rollout {sample.place.rollout}, "
        f"update {sample.place.update}, step {sample.place.step}"
    )
    table = _table(title, "token", ("t", "id", "mu", "pi", *sample.weight))
    table.caption = "each trust region's weight of the token; . is a token that is not trained on"
    for t, token in enumerate(sample.token_ids):
        text = sample.texts[t] if sample.texts else ""
        cells = [_decision(sample.trainable[t], sample.keep[name][t], sample.weight[name][t]) for name in sample.weight]
        table.add_row(_text(text), str(t + 1), str(token), f"{sample.mu[t]:.3f}", f"{sample.pi[t]:.3f}", *cells)
    return table


def _decision(trainable: bool, keep: bool, weight: float) -> Text:
    if not trainable:
        return Text(".")
    return Text(f"{weight:.2f}") if keep else Text("masked", style="bold red")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _text(text: str) -> Text:
    """Nothing in it is markup, nor does it drive a terminal."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
