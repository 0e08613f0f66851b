"""Prompts and responses to read in TensorBoard."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from cppo_lightning.callbacks.reporting import rollout_data
from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from cppo_lightning.batch import RolloutBatch
    from cppo_lightning.rollout.sampler import Sample

COLUMNS = 110


class TextSamples(Callback):
    """Writes some samples of a rollout (prompt, response, answer, verdict, reward) to TensorBoard as ``samples/0`` and so on.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before the model is loaded: refuses a datamodule that does not sample."""
        if stage == "fit":
            rollout_data(trainer, type(self).__name__)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; before the first one of every few rollouts it writes samples."""
        if batch_idx > 0 or trainer.current_epoch % self.every_n_rollouts or not trainer.is_global_zero:
            return
        rollout = rollout_data(trainer, type(self).__name__).rollout
        if rollout is None or not rollout.samples:
            return
        count = min(self.count, len(rollout.samples))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for i in range(count):
                    sample = rollout.samples[i * len(rollout.samples) // count]
                    logger.experiment.add_text(f"samples/{i}", as_markdown(sample, self.max_chars), trainer.global_step)


def as_markdown(sample: Sample, max_chars: int) -> str:
    """One sample as Markdown in which nothing that a dataset or a model wrote is markup."""
    completion, verdict = sample.completion, sample.verdict
    cut = "" if completion.finished else ", cut off by the length limit"
    parts = [f"**{verdict.outcome.value}**, reward {verdict.reward:g}, {len(completion.ids)} tokens{cut}"]
    texts = [(turn["role"], turn["content"]) for turn in sample.problem.messages]
    texts += [("response", sample.text), ("answer", sample.problem.answer), ("read as", verdict.extracted or "(nothing)")]
    texts += [("verifier", verdict.detail)] if verdict.detail else []
    for title, text in texts:
        parts.append(f"*{_plain(title)}*\n\n{_literal(text, max_chars)}")
    return "\n\n".join(parts)


def _literal(text: str, max_chars: int) -> str:
    """An indented code block: no fence that the text could close, and long lines wrapped because the panel does not."""
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[len(text) - half :]}"
    lines = [part for line in _printable(text).split("\n") for part in (textwrap.wrap(line, COLUMNS) or [""])]
    return "\n".join(f"    {line}" for line in lines)


def _plain(title: str) -> str:
    """A title without what Markdown or HTML could take for markup: a data set may call its roles anything."""
    return "".join(c if c.isalnum() or c in " -_" else "?" for c in title)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text.expandtabs(4))
