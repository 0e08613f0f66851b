"""TensorBoard's charts in a useful order, and a run's settings beside its results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from cppo_lightning.callbacks.reporting import tensorboards
from cppo_lightning.metric_dictionary import SECTIONS, ends

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

BANDS = "Intervals"
Layout = dict[str, dict[str, list[Any]]]  # as SummaryWriter.add_custom_scalars takes it


class TensorBoardLayout(Callback):
    """Fills two of TensorBoard's tabs: CUSTOM SCALARS with the run's charts in order, HPARAMS with its settings and results.

    The charts are the panels of the metric dictionary that the run has numbers for, under the dictionary's headings, and last a
    chart with a band for each number that has an interval.  What a callback of your own logs is in the tab SCALARS alone.

    The settings are the numbers and texts of the command line's configuration by their dotted key; lists are left out, and a
    run without the command line has none.  TensorBoard shows the last value of each metric beside them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tags: set[str] = set()  # logged so far, in this run and those that it goes on from
        self._charted: set[str] = set()  # those that the newest layout was made for

    def state_dict(self) -> dict[str, Any]:
        return {"tags": sorted(self._tags)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tags = set(state_dict["tags"])

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Runs after metrics were logged: notes their tags."""
        self._tags |= metrics.keys()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first rollout: writes the settings."""
        self._charted = set()
        self._write_hparams(trainer, ended=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs after each update: writes the layout if tags are new, mostly after the first."""
        self._write_layout(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training: adds what came last, and that the run ended well."""
        self._write_layout(trainer)
        self._write_hparams(trainer, ended=True)

    def _write_layout(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._tags == self._charted:
            return
        self._charted = set(self._tags)
        for writer in tensorboards(trainer):
            writer.add_custom_scalars(layout(self._tags))  # TensorBoard shows the newest
            writer.flush()

    def _write_hparams(self, trainer: Trainer, ended: bool) -> None:
        if not trainer.is_global_zero or not (settings := hyperparameters(trainer)):
            return
        from torch.utils.tensorboard.summary import hparams

        # TensorBoardLogger.log_hyperparams would log each result again at a step that it is not of.  The first part would fix
        # the tab's columns to those of one run, and hide what only other trust regions have
        _, begin, end = hparams(settings, {})
        for writer in tensorboards(trainer):
            writer._get_file_writer().add_summary(end if ended else begin)
            writer.flush()


def layout(tags: Collection[str]) -> Layout:
    """Charts for those of the ``tags`` that the dictionary has, by heading and title, in its order; bands come last.

    A panel's chart names families of tags and not tags, so that runs with other sets share it.
    """
    found: Layout = {}
    bands: dict[str, list[Any]] = {}
    for section in SECTIONS:
        charts: dict[str, list[Any]] = {}
        for panel in section.panels:
            there = sorted(tag for tag in tags if any(metric.matches(tag) for metric in panel.metrics))
            if there:
                charts[f"{panel.title} [{panel.unit}]"] = ["Multiline", [metric.pattern for metric in panel.metrics]]
            bands |= {f"{tag} [{panel.unit}]": ["Margin", [tag, *ends(tag)]] for tag in there if set(ends(tag)) <= set(there)}
        if charts:
            found[section.title] = charts
    # under a heading of their own: there are many, and TensorBoard (2.21) puts them behind other charts, the last one first
    return found | ({BANDS: dict(reversed(bands.items()))} if bands else {})


def hyperparameters(trainer: Trainer) -> dict[str, float | str]:
    """Numbers and texts of the command line's configuration by dotted key; empty for a Trainer that it did not make."""
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, SaveConfigCallback):
            return _flat(yaml.safe_load(callback.parser.dump(callback.config)))
    return {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found[f"{prefix}{name}"] = str(value).lower()  # TensorBoard's number 1 would not tell true from 1
        elif isinstance(value, int | float | str):
            found[f"{prefix}{name}"] = value
    return found
