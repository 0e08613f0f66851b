"""Prompts and responses to read in TensorBoard, with the tokens that the trust region dropped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from cppo_lightning.callbacks.reporting import RolloutData, printable, rollout_data, tensorboards
from cppo_lightning.callbacks.token_marks import Cause, ChosenCauses, Piece, bracketed, counted, pieces
from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats
    from cppo_lightning.rollout.sampler import Sample

COLUMNS = 110


@dataclass(frozen=True)
class Training:
    """The last update that a response was trained in."""

    update: str  # which of the rollout's, and after how many steps
    on_policy: bool  # whether its weights were those that sampled
    causes: list[int]  # of each token


class TextSamples(Callback):
    """Writes some samples of a rollout (prompt, response, answer, verdict, reward) to TensorBoard as ``samples/0`` and so on.

    They are written after the rollout's updates, at the number of optimizer steps before them.  In the response, tokens that
    the trust region dropped in the update that it was part of stand in brackets: ⟦by the token threshold⟧, ⟪by the prefix
    budget⟫, ⟨by a trust region that tells no causes⟩.  An update with the weights that sampled drops nothing.

    Args:
        every_n_rollouts: rollouts between two writes, the first rollout included.
        count: samples each time, spread evenly over the rollout.
        max_chars: longer texts keep their beginning and end.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, every_n_rollouts: int = 5, count: int = 4, max_chars: int = 6000) -> None:
        super().__init__()
        for key, value in (("every_n_rollouts", every_n_rollouts), ("count", count), ("max_chars", max_chars)):
            if value < 1:
                raise ConfigError(f"TextSamples.{key} must be at least 1, got {value}")
        self.every_n_rollouts = every_n_rollouts
        self.count = count
        self.max_chars = max_chars
        self._step = 0  # of the rollout's first update
        self._update, self._on_policy = "", False  # of the one under way
        self._seen: ChosenCauses | None = None
        self._chosen: dict[int, Training | None] = {}  # by place in the rollout; empty if none is to be written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            self._data(trainer)
            self._chosen = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; before the first one of every few rollouts it chooses the samples, on rank zero."""
        self._update = f"update {batch_idx + 1} of {trainer.num_training_batches}, at step {trainer.global_step}"
        self._seen, rollout = None, self._data(trainer).rollout
        if rollout is None or not trainer.is_global_zero:
            return
        if not self._chosen and trainer.current_epoch % self.every_n_rollouts == 0:
            self._step = trainer.global_step
            number = len(rollout.samples)
            count = min(self.count, number)
            self._chosen = {i * number // count: None for i in range(count)}
        if self._chosen:
            self._on_policy = rollout.version == trainer.global_step
            self._seen = ChosenCauses(torch.tensor(list(self._chosen), device=pl_module.device))

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: notes what it dropped of the chosen samples, and waits for nothing."""
        if self._seen is not None:
            self._seen.add(stats, gate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update: reads what was noted."""
        rollout = self._data(trainer).rollout
        if self._seen is None or rollout is None:
            return
        for place, found in self._seen.read().items():
            length = len(rollout.samples[place].completion.ids)
            found = [*found[:length], *[Cause.KEPT] * (length - len(found))]  # micro-batches end at the last trained token
            self._chosen[place] = Training(self._update, self._on_policy, found)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update: writes the chosen samples."""
        data, chosen = self._data(trainer), self._chosen
        self._chosen = {}
        if data.rollout is None:
            return
        for i, (place, training) in enumerate(chosen.items()):
            sample = data.rollout.samples[place]
            text = as_markdown(sample, self.max_chars, _note(training), _response(sample, training, data))
            for writer in tensorboards(trainer):
                writer.add_text(f"samples/{i}", text, self._step)

    def _data(self, trainer: Trainer) -> RolloutData:
        return rollout_data(trainer, type(self).__name__)


def _note(training: Training | None) -> str:
    if training is None:
        return "not trained on in this run"
    reason = ": the weights are those that sampled" if training.on_policy and not any(training.causes) else ""
    return f"{training.update}: {counted(training.causes)}{reason}"


def _response(sample: Sample, training: Training | None, data: RolloutData) -> list[Piece]:
    """The response with its special tokens, which are trained on too; as the verifier saw it if it was not trained on."""
    if training is None:
        return [(Cause.KEPT, sample.text)]
    return pieces(sample.completion.ids.tolist(), training.causes, data.sampler.tokenizer)


def as_markdown(sample: Sample, max_chars: int, note: str = "", response: Sequence[Piece] = ()) -> str:
    """One sample as Markdown in which nothing that a dataset or a model wrote is markup.

    Args:
        sample: whose prompt, answer and verdict are shown.
        max_chars: longer texts keep their beginning and end.
        note: a line on its training, of this module's own words.
        response: the response's text in pieces; none for the sample's own, unmarked.
    """
    completion, verdict = sample.completion, sample.verdict
    cut = "" if completion.finished else ", cut off by the length limit"
    parts = [f"**{verdict.outcome.value}**, reward {verdict.reward:g}, {len(completion.ids)} tokens{cut}"]
    parts += [note] if note else []
    texts = [(turn["role"], [(Cause.KEPT, turn["content"])]) for turn in sample.problem.messages]
    texts.append(("response", list(response) or [(Cause.KEPT, sample.text)]))
    others = {"answer": sample.problem.answer, "read as": verdict.extracted or "(nothing)", "verifier": verdict.detail}
    texts += [(title, [(Cause.KEPT, text)]) for title, text in others.items() if text or title != "verifier"]
    for title, text in texts:
        parts.append(f"*{_plain(title)}*\n\n{_literal(text, max_chars)}")
    return "\n\n".join(parts)


def _literal(text: Sequence[Piece], max_chars: int) -> str:
    """An indented code block: no fence that the text could close, and long lines wrapped because the panel does not."""
    length, half = sum(len(part) for _, part in text), max_chars // 2
    if length > max_chars:
        gap = (Cause.KEPT, f"\n... {length - 2 * half} characters left out ...\n")
        text = [*_span(text, 0, half), gap, *_span(text, length - half, length)]
    shown = [printable(line) for line in bracketed(text).expandtabs(4).split("\n")]
    lines = [part for line in shown for part in (textwrap.wrap(line, COLUMNS) or [""])]
    return "\n".join(f"    {line}" for line in lines)


def _span(text: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """Characters ``start`` to ``end`` of a text in pieces."""
    found, at = [], 0
    for cause, part in text:
        found.append((cause, part[max(0, start - at) : max(0, end - at)]))
        at += len(part)
    return [piece for piece in found if piece[1]]


def _plain(title: str) -> str:
    """A title without what Markdown or HTML could take for markup: a data set may call its roles anything."""
    return "".join(c if c.isalnum() or c in " -_" else "?" for c in title)
