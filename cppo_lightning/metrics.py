"""Sums and counts that are reduced over ranks before any division, and the sums that a gate gives.

A mean of means is not the mean when ranks, micro-batches or responses carry different numbers of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cppo_lightning.observers import MetricsObserver, observers

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cppo_lightning.batch import Gate, TokenStats

Totals = Mapping[str, tuple[Tensor | float, Tensor | float]]  # name -> (sum, count), scalars


class WeightedMeans(Metric):
    """Means of many named quantities, each sum / count over all updates and ranks.

    Args:
        names: every name that ``update`` may give; the same, in the same order, on every rank.
    """

    full_state_update = False
    totals: Tensor  # [N, 2] float64, (sum, count) by name: one state, hence one reduction for all names

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("totals", torch.zeros(len(self.names), 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, totals: Totals) -> None:
        """Add sums and counts; names left out add nothing.  Tensors decide the device, and nothing waits for it.

        Raises:
            ValueError: a name that the constructor was not given.
        """
        _check_names(totals.keys(), self.names)
        _follow(self, [value for pair in totals.values() for value in pair])
        if self.names:
            pairs = [totals.get(name, (0.0, 0.0)) for name in self.names]
            self.totals = self.totals + _stack([value for pair in pairs for value in pair], self.totals).view(-1, 2)

    def compute(self) -> dict[str, float]:
        """The means; a name whose count is 0 on all ranks is left out."""
        rows = zip(self.names, self.totals.tolist(), strict=True)
        return {name: total / count for name, (total, count) in rows if count > 0}


class Maxima(Metric):
    """Maxima of many named quantities over all updates and ranks.

    Args:
        names: every name that ``update`` may give; the same, in the same order, on every rank.
    """

    full_state_update = False
    maxima: Tensor  # [N] float64, -inf where nothing was seen

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("maxima", torch.full((len(self.names),), -math.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, values: Mapping[str, Tensor | float]) -> None:
        """Take scalars in; -inf stands for nothing seen.

        Raises:
            ValueError: a name that the constructor was not given.
        """
        _check_names(values.keys(), self.names)
        _follow(self, list(values.values()))
        if self.names:
            self.maxima = self.maxima.maximum(_stack([values.get(n, -math.inf) for n in self.names], self.maxima))

    def compute(self) -> dict[str, float]:
        """The maxima; a name of which nothing was seen on any rank is left out."""
        return {n: value for n, value in zip(self.names, self.maxima.tolist(), strict=True) if value != -math.inf}


def drain(metric: WeightedMeans | Maxima, device: torch.device) -> dict[str, float]:
    """Reduce over ranks on ``device``, return the result and start anew.  Every rank must call it, also one without data."""
    _move(metric, device)  # a rank that saw no tensor has its sums on the CPU, where NCCL cannot reduce them
    metric.update({})  # a rank without data takes part too, and torchmetrics warns of a compute without an update
    values = metric.compute()
    metric.reset()
    return values


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log once, from any hook, at ``step`` (None: ``trainer.global_step``); ``ModelCheckpoint`` can monitor it.

    ``LightningModule.log`` would write a value again at each later step of its epoch, and ``log_every_n_steps`` would lose what
    is logged once per rollout; after training it is forbidden.
    """
    if not metrics:
        return
    step = trainer.global_step if step is None else step
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
        logger.save()
    for observer in observers(trainer, MetricsObserver):
        observer.on_metrics(trainer, metrics, step)


def masked_total(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` where ``mask``, and how many those are: two float64 scalars on the values' device."""
    dtype = sum_dtype(values.device)
    return values.masked_fill(~mask, 0).sum(dtype=dtype), mask.sum(dtype=dtype)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest of ``values`` where ``mask``, -inf where there is none: a float scalar."""
    return values.float().masked_fill(~mask, -math.inf).max() if values.numel() else values.new_full((), -math.inf).float()


def bin_names(bins: int) -> list[str]:
    """Relative positions in per cent, ``00-10`` to ``90-100`` for ten bins."""
    edges = [round(100 * i / bins) for i in range(bins + 1)]
    return [f"{low:02d}-{high:02d}" for low, high in pairwise(edges)]


def mask_names(bins: int) -> list[str]:
    """Names that :func:`mask_totals` may give."""
    causes = ["mask/rate", "mask/toward", "mask/by_position", "mask/by_budget"]
    return causes + [f"mask/rate_at/{name}" for name in bin_names(bins)]


def mask_totals(stats: TokenStats, gate: Gate, bins: int) -> Totals:
    """Tokens that the trust region dropped, as shares of the trainable tokens, by cause and by relative position."""
    mask = stats.mask
    dropped = mask & ~gate.keep
    toward = gate.diagnostics.get("toward")
    if toward is None:
        toward = stats.toward
    totals: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "mask/rate": masked_total(dropped, mask),
        "mask/toward": masked_total(toward, mask),
    }
    for cause in ("by_position", "by_budget"):
        if f"masked_{cause}" in gate.diagnostics:
            totals[f"mask/{cause}"] = masked_total(gate.diagnostics[f"masked_{cause}"], mask)
    return {**totals, **position_totals("mask/rate_at", dropped, mask, bins)}


def position_totals(tag: str, values: Tensor, mask: Tensor, bins: int) -> Totals:
    """``<tag>/00-10`` and so on: sums and counts of ``values`` ``[B, T]`` by relative position in the response.

    A token is in bin ``bins * p // T``, p being its 0-based position among the response's own T trainable tokens.
    """
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    index = (bins * position // mask.sum(-1, keepdim=True).clamp(min=1)).clamp(max=bins - 1).flatten()
    empty = torch.zeros(bins, dtype=sum_dtype(mask.device), device=mask.device)
    sums = empty.index_add(0, index, values.masked_fill(~mask, 0).flatten().to(empty.dtype))
    counts = empty.index_add(0, index, mask.flatten().to(empty.dtype))
    pairs = zip(sums.unbind(), counts.unbind(), strict=True)
    return {f"{tag}/{name}": pair for name, pair in zip(bin_names(bins), pairs, strict=True)}


BUDGET_MEANS = ("budget/exhausted_share", "budget/spent_mean", "budget/delta_b", "budget/first_exhausted", "budget/threshold")


def budget_totals(stats: TokenStats, gate: Gate) -> Totals:
    """How far the prefix budget was spent, over responses with a trainable token; empty when there is no budget."""
    found = gate.diagnostics
    length = stats.mask.sum(-1)
    real = length > 0  # ranks with less work get rows without tokens
    totals: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    for name, key in (("exhausted_share", "budget_exhausted"), ("spent_mean", "budget_spent"), ("delta_b", "delta_b")):
        if key in found:
            totals[f"budget/{name}"] = masked_total(found[key], real)
    if "first_exhausted" in found:
        first = found["first_exhausted"]
        totals["budget/first_exhausted"] = masked_total(first / length.clamp(min=1), real & (first >= 0))
    if totals and "threshold" in found:
        totals["budget/threshold"] = masked_total(found["threshold"], stats.mask)
    return totals


def _check_names(given: Any, known: Sequence[str]) -> None:
    if unknown := set(given) - set(known):
        raise ValueError(f"unknown metric names {sorted(unknown)}; this metric was made for {list(known)}")


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over many tokens are kept in on this device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _follow(metric: Metric, values: Sequence[Tensor | float]) -> None:
    """Move the metric's state to where its values are."""
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    if device is not None:
        _move(metric, device)


def _move(metric: Metric, device: torch.device) -> None:
    if device != metric.device:
        if device.type == "mps":
            metric.set_dtype(torch.float32)
        metric.to(device)


def _stack(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    return torch.stack([_scalar(value, like) for value in values])


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    # filled on the device: a number copied to an accelerator would wait for it
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
