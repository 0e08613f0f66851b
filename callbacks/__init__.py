"""Lightning callbacks that watch a run, imported as ``cppo_lightning.callbacks``."""

from __future__ import annotations

if __name__ != "cppo_lightning.callbacks":
    raise ImportError(
        f"imported as {__name__!r}: these callbacks are the package cppo_lightning.callbacks; run from another folder"
    )

from cppo_lightning.callbacks.aime_accuracy import AIMEAccuracy
from cppo_lightning.callbacks.anchor_guard import AnchorGuard
from cppo_lightning.callbacks.budget_exhaustion import BudgetExhaustion
from cppo_lightning.callbacks.data_report import DataReport
from cppo_lightning.callbacks.divergence import Divergence
from cppo_lightning.callbacks.eval_accuracy import EvalAccuracy
from cppo_lightning.callbacks.evaluation_report import EvaluationReport
from cppo_lightning.callbacks.explain import Explain
from cppo_lightning.callbacks.failure_checkpoint import FailureCheckpoint
from cppo_lightning.callbacks.gate_metrics import GateMetrics
from cppo_lightning.callbacks.logprob_gap import LogProbGap
from cppo_lightning.callbacks.mask_rate import MaskRate
from cppo_lightning.callbacks.mismatch import Mismatch
from cppo_lightning.callbacks.nonfinite_guard import NonFiniteGuard
from cppo_lightning.callbacks.prediction_writer import PredictionWriter
from cppo_lightning.callbacks.rollout_metrics import RolloutMetrics
from cppo_lightning.callbacks.rollout_progress import RolloutProgress
from cppo_lightning.callbacks.rollout_recorder import RolloutRecorder
from cppo_lightning.callbacks.run_checkpoint import RunCheckpoint
from cppo_lightning.callbacks.run_summary import RunSummary
from cppo_lightning.callbacks.shutdown import Shutdown
from cppo_lightning.callbacks.tensorboard_layout import TensorBoardLayout
from cppo_lightning.callbacks.text_samples import TextSamples
from cppo_lightning.callbacks.trust_region_figures import TrustRegionFigures
from cppo_lightning.callbacks.weight_sync_canary import WeightSyncCanary

__all__ = [
    "AIMEAccuracy",
    "AnchorGuard",
    "BudgetExhaustion",
    "DataReport",
    "Divergence",
    "EvalAccuracy",
    "EvaluationReport",
    "Explain",
    "FailureCheckpoint",
    "GateMetrics",
    "LogProbGap",
    "MaskRate",
    "Mismatch",
    "NonFiniteGuard",
    "PredictionWriter",
    "RolloutMetrics",
    "RolloutProgress",
    "RolloutRecorder",
    "RunCheckpoint",
    "RunSummary",
    "Shutdown",
    "TensorBoardLayout",
    "TextSamples",
    "TrustRegionFigures",
    "WeightSyncCanary",
]
