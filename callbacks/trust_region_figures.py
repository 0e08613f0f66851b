"""Pictures of what the trust region does, in TensorBoard while it does it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from cppo_lightning.callbacks import run_pictures
from cppo_lightning.callbacks.reporting import rollout_data
from cppo_lightning.errors import ConfigError
from cppo_lightning.history import SumHistory
from cppo_lightning.positions import PositionBins, PositionSums, TokenWindow
from cppo_lightning.ranks import data_sum

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

    from cppo_lightning.batch import Gate, RolloutBatch, TokenStats


class TrustRegionFigures(Callback):
    """Draws a run's own version of the CPPO paper's figures (arXiv 2606.10968) every few rollouts, over all ranks.

    ``figures/divergence_by_position``: mean and largest tenth of D_t, and delta / w_t over them, in the last rollout (Fig. 2).
    ``figures/threshold_window``: the stretch with the most dropped tokens of any response of the last rollout, token by token,
    with its thresholds and the budget spent (Fig. 3).  ``figures/budget``: mean delta_b and the share of the dropped tokens
    that the budget dropped, over the run (Fig. 7).  ``figures/mask_heat_map``: mask rate by position and step.
    ``figures/first_exhausted``: where in the responses of the last rollout the budget first ran out.

    D_t is the trust region's own divergence, or |pi - mu| of the sampled token where it has none.  What a trust region does not
    have (a threshold, a budget), and what has not happened yet (a dropped token, a budget that ran out), is not drawn.  Under
    ``data.plan.passes`` above 1 a rollout's tokens and responses count in each pass.

    Args:
        every_n_rollouts: rollouts between two pictures; the first rollout has its own in any case, and so has the last
            one, even where steps, time or an early stop cut it short.
        bins: bins of positions at most, of equal width up to ``data.sampling.max_tokens``.
        window: tokens in the threshold window.
        history: rows of the pictures over the run, at most; when they are full, rollouts are shown in twos, then in fours.

    Raises:
        ConfigError: a number below 1, or a ``history`` that is odd.
    """

    def __init__(self, every_n_rollouts: int = 10, bins: int = 64, window: int = 120, history: int = 256) -> None:
        super().__init__()
        for key, value in (("every_n_rollouts", every_n_rollouts), ("bins", bins), ("window", window), ("history", history)):
            if value < 1:
                raise ConfigError(f"TrustRegionFigures.{key} must be at least 1, got {value}")
        if history % 2:
            raise ConfigError(f"TrustRegionFigures.history must be even (usual: 256), got {history}")
        self.every_n_rollouts, self.at_most, self.width = every_n_rollouts, bins, window
        self._history = SumHistory(history)
        self._bins = PositionBins(1, bins)
        self._start = 0  # optimizer steps before the rollout under way
        self._rollout, self._window = PositionSums(self._bins), TokenWindow.empty(window)  # of its updates, over all ranks
        self._update: PositionSums | None = None  # of the update under way, on this rank's device
        self._update_window: TokenWindow | None = None
        self._own = False  # whether gates have a divergence
        self._undrawn: int | None = None  # number of the last rollout, until it has its pictures
        self._fits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs before any checkpoint is read: makes bins for responses of the run's length."""
        self._fits = stage == "fit"
        if self._fits:
            longest = rollout_data(trainer, type(self).__name__).sampling.max_tokens
            self._bins = PositionBins.up_to(longest, self.at_most)
            self._rollout = PositionSums(self._bins)

    def state_dict(self) -> dict[str, Any]:
        """The run so far and, for a checkpoint in the middle of a rollout, the updates on it: the same on every rank."""
        return {
            "bins": (self._bins.width, self._bins.count),
            "history": self._history.state_dict(),
            "start": self._start,
            "rollout": self._rollout.flat.clone(),
            "window": self._window.values.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; evaluations read checkpoints too, and draw nothing."""
        if not self._fits:
            return
        ours = (self._bins.width, self._bins.count), self._window.values.shape
        saved = tuple(state_dict["bins"]), state_dict["window"].shape
        if saved != ours:
            rank_zero_warn(f"TrustRegionFigures starts anew: the checkpoint has bins and window {saved}, this run has {ours}")
            return
        self._history.load_state_dict(state_dict["history"])
        self._start = state_dict["start"]
        self._rollout = PositionSums(self._bins, state_dict["rollout"].cpu().clone())
        self._window = TokenWindow(state_dict["window"].cpu().clone())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int) -> None:
        """Runs before each update; before a rollout's first one it starts anew."""
        if batch_idx == 0:
            self._start = trainer.global_step
            self._rollout, self._window = PositionSums(self._bins), TokenWindow.empty(self.width)

    def on_gate(self, trainer: Trainer, pl_module: LightningModule, stats: TokenStats, gate: Gate) -> None:
        """Runs after each micro-batch's gate: adds to the sums without waiting for the accelerator."""
        threshold = getattr(getattr(pl_module, "trust_region", None), "token_threshold", None)
        self._own = "divergence" in gate.diagnostics
        if self._update is None:
            self._update = PositionSums(self._bins, device=stats.mask.device)
        self._update.add(stats, gate, threshold)
        # of every rollout, since any may turn out to be the last
        window = TokenWindow.of(stats, gate, threshold, self.width)
        self._update_window = window if self._update_window is None else self._update_window | window

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """Runs after each update, also a skipped one, on every rank: adds up over ranks; after a rollout's last it draws."""
        # here and not at the rollout's end, so that a checkpoint between two updates has all ranks' sums
        update = self._update or PositionSums(self._bins, device=pl_module.device)
        self._rollout.flat += data_sum(trainer, update.flat).cpu()
        window = self._update_window or TokenWindow.empty(self.width, pl_module.device)
        for values in trainer.strategy.all_gather(window.values).cpu().view(-1, *window.values.shape):
            self._window |= TokenWindow(values)
        self._update = self._update_window = None
        self._undrawn = trainer.current_epoch + 1
        if trainer.is_last_batch:
            self._add_to(self._history, trainer)
            if trainer.current_epoch % self.every_n_rollouts == 0:
                self._draw(trainer, pl_module, self._history)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training: draws the last rollout if it has no pictures yet, as much of it as was trained on."""
        if self._undrawn is None:
            return
        history = deepcopy(self._history)  # a run that goes on from here adds the whole rollout itself
        if not trainer.is_last_batch:
            self._add_to(history, trainer)
        self._draw(trainer, pl_module, history)

    def _add_to(self, history: SumHistory, trainer: Trainer) -> None:
        history.add(self._start, trainer.global_step, run_pictures.history_row(self._rollout))

    def _draw(self, trainer: Trainer, pl_module: LightningModule, history: SumHistory) -> None:
        number, self._undrawn = self._undrawn, None
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or not trainer.is_global_zero:
            return
        from cppo_lightning.figures.style import to_image

        note = f"rollout {number}, steps {self._start} to {trainer.global_step}"
        if rollout_data(trainer, type(self).__name__).plan.passes > 1:
            note += ", each pass counted"
        for name, figure in self._pictures(pl_module, history, note):
            pixels = to_image(figure)
            for board in boards:
                board.experiment.add_image(f"figures/{name}", pixels, max(0, trainer.global_step - 1), dataformats="HWC")

    def _pictures(self, pl_module: LightningModule, history: SumHistory, note: str) -> Iterator[tuple[str, Figure]]:
        measure = run_pictures.measure_of(getattr(pl_module, "trust_region", None), self._own)
        yield from run_pictures.of_rollout(self._rollout, self._window, measure, note)
        yield from run_pictures.of_run(history, self._bins, measure)
