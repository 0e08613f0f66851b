"""Every recorded micro-batch under every trust region."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.mismatch import MismatchCorrection, decoupled_gate
from cppo_lightning.replay.comparison import Comparison, RegionNumbers, Tally
from cppo_lightning.replay.reading import read
from cppo_lightning.replay.regions import is_ours, load_region, made_from
from cppo_lightning.replay.run_card import RunCard, parts_of, read_card
from cppo_lightning.replay.samples import SampleView, view
from cppo_lightning.trust_regions import TrustRegion

if TYPE_CHECKING:
    from cppo_lightning.batch import Gate
    from cppo_lightning.replay.layout import Recorded

AS_RECORDED = "as recorded"
_AGAIN = "again"


@dataclass(frozen=True)
class Replay:
    """What came of it.

    Args:
        card: what the recording was made with.
        comparison: of the run's own decisions, ``as recorded``, with each file's trust region.
        again: the run's own trust region, made anew and asked again, where it is one of this package; None for another, which
            a file can name.
        sample: the response that was asked for.
    """

    card: RunCard
    comparison: Comparison
    again: RegionNumbers | None
    sample: SampleView | None


def replay(recording: Path, configs: Sequence[Path], slices: int = 10, sample: int | None = None) -> Replay:
    """Put the tokens of a recording under other trust regions, one micro-batch at a time, on the CPU.

    Micro-batches come in the order of the run, each with the rows and the padding that it had there.  What a trust region
    keeps from step to step begins anew.

    Args:
        recording: its folder.
        configs: YAML files with ``model.trust_region``; a file's stem is its name.
        slices: of a response's own length, for numbers by position.
        sample: number of a response to see token by token, in the order of the run; None for none.

    Raises:
        ConfigError: a file that cannot be read, two of one name, a trust region that needs what was not recorded, or a number
            that no response has.
    """
    card = read_card(recording)
    asked = Asked(card, _load(configs))
    own = _own(card)
    tally, again = Tally((AS_RECORDED, *asked.regions), slices), Tally((AS_RECORDED, _AGAIN), 1)
    chosen = None
    for recorded in _micro_batches(recording):
        gates = {AS_RECORDED: recorded.gate, **asked.gates(recorded)}
        row = -1 if sample is None else sample - tally.responses
        if 0 <= row < len(recorded.batch):
            chosen = view(recorded, row, gates, card.model)
        tally.add(recorded.place, recorded.stats, gates)
        if own is not None:
            both = {AS_RECORDED: recorded.gate, _AGAIN: asked.gate(own, recorded)}
            again.add(recorded.place, recorded.stats, both)
    if not tally.responses:
        raise ConfigError(f"recording: {str(recording)!r} has no rollouts; RolloutRecorder writes one after each update")
    if sample is not None and chosen is None:
        raise ConfigError(f"--sample {sample}: the recording has {tally.responses} responses; take 0 to {tally.responses - 1}")
    return Replay(card, tally.result(), None if own is None else again.result().regions[_AGAIN], chosen)


def _load(configs: Iterable[Path]) -> dict[str, TrustRegion]:
    regions: dict[str, TrustRegion] = {}
    for file in configs:
        if file.stem in (*regions, AS_RECORDED):
            raise ConfigError(f"--config {str(file)!r}: {file.stem!r} is taken; names are those of files, give it another")
        regions[file.stem] = load_region(file)
    return regions


def _own(card: RunCard) -> TrustRegion | None:
    """The run's own trust region; None for a class from elsewhere, since a recording must not choose what is imported."""
    return made_from(card.trust_region, TrustRegion, "run.json: trust_region") if is_ours(card.trust_region) else None


def _micro_batches(recording: Path) -> Iterator[Recorded]:
    for paths in parts_of(recording).values():
        for path in paths:
            yield from read(path)


class Asked:
    """Trust regions, and what their ratios start at.

    Those that the run could have anchored at pi_old see it if the run's own did, with the run's correction; others see mu.
    """

    def __init__(self, card: RunCard, regions: Mapping[str, TrustRegion]) -> None:
        self.regions = regions
        self.recomputed = card.anchor == "recomputed"
        self.correction: MismatchCorrection | None = None
        if self.recomputed and card.mismatch is not None:
            if not is_ours(card.mismatch):
                raise ConfigError(
                    f"run.json: mismatch is {card.mismatch.get('class_path')!r}, which is not part of cppo_lightning: weights "
                    "of other trust regions under it cannot be told"
                )
            self.correction = made_from(card.mismatch, MismatchCorrection, "run.json: mismatch")

    def gates(self, recorded: Recorded) -> dict[str, Gate]:
        """Each trust region's, by name.

        Raises:
            ConfigError: one reads more top-K entries than were recorded.
        """
        for name, region in self.regions.items():
            if region.top_k > recorded.top_k:
                raise ConfigError(
                    f"--config {name}: it reads the top {region.top_k} tokens of mu, and the top {recorded.top_k} were "
                    f"recorded; lower its k, take a binary divergence, or record a run whose trust region reads {region.top_k}"
                )
        return {name: self.gate(region, recorded) for name, region in self.regions.items()}

    @torch.no_grad()
    def gate(self, region: TrustRegion, recorded: Recorded) -> Gate:
        if self.recomputed and region.recomputable:
            return decoupled_gate(region, recorded.stats, recorded.batch, self.correction)
        return region(recorded.stats)
