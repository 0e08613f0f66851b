"""Sums and counts: against plain arithmetic, in one process and over two ranks."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cppo_lightning.metrics import Maxima, WeightedMeans, bin_names, budget_totals, drain, mask_names, mask_totals, masked_total
from tests.callback_rig import rows, stats_and_gate

CPU = torch.device("cpu")
NAMES = ["a", "b", "never"]


def updates() -> list[dict[str, tuple[float, float]]]:
    """Nine updates; "a" in all, "b" in some, "never" in none."""
    numbers = random.Random(0)
    return [
        {name: (numbers.uniform(-5, 5), numbers.randint(1, 9)) for name in (("a", "b") if i % 3 else ("a",))} for i in range(9)
    ]


def expected() -> dict[str, float]:
    found = updates()
    return {n: sum(u[n][0] for u in found if n in u) / sum(u[n][1] for u in found if n in u) for n in ("a", "b")}


def test_weighted_means_divide_sums_by_counts_and_leave_out_what_was_never_counted() -> None:
    metric = WeightedMeans(NAMES)
    for update in updates():
        metric.update(update)
    assert drain(metric, CPU) == pytest.approx(expected(), rel=1e-12)
    assert drain(metric, CPU) == {}, "drained: nothing is carried over"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown metric names \['c'\]"):
        WeightedMeans(NAMES).update({"c": (1.0, 1.0)})


def test_maxima_keep_the_largest_even_below_zero() -> None:
    metric = Maxima(NAMES)
    for value in (-3.0, -2.0, -7.0):
        metric.update({"a": torch.tensor(value)})
    assert drain(metric, CPU) == {"a": -2.0}
    assert drain(metric, CPU) == {}


def test_counts_beyond_float32_stay_exact() -> None:
    metric = WeightedMeans(["a"])
    metric.update({"a": (float(2**24), float(2**24))})
    metric.update({"a": (1.0, 1.0)})  # lost in float32
    metric.update({"a": (0.0, 1.0)})
    assert drain(metric, CPU)["a"] == (2**24 + 1) / (2**24 + 2)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    means, maxima, silent = WeightedMeans(NAMES), Maxima(NAMES), WeightedMeans(NAMES)
    for update in updates()[2:] if rank else updates()[:2]:  # ranks with unequal work
        means.update(update)
        maxima.update({name: total for name, (total, _) in update.items()})
    if rank:  # the other rank has nothing to say and must take part all the same
        silent.update({"b": (3.0, 2.0)})
    found: tuple[Any, ...] = tuple(drain(metric, CPU) for metric in (means, maxima, silent))
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    maxima = {name: max(u[name][0] for u in updates() if name in u) for name in ("a", "b")}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[0] == pytest.approx(expected(), rel=1e-12)
        assert found[1:] == (maxima, {"b": 1.5})


def test_bins_cover_a_response_from_0_to_100_per_cent() -> None:
    assert bin_names(10)[0] == "00-10"
    assert bin_names(10)[-1] == "90-100"
    assert bin_names(3) == ["00-33", "33-67", "67-100"]


def test_a_gate_cut_into_micro_batches_gives_the_same_sums() -> None:
    whole, parts = WeightedMeans(mask_names(5)), WeightedMeans(mask_names(5))
    whole.update(mask_totals(*stats_and_gate(), bins=5))
    for i in range(3):
        parts.update(mask_totals(*rows(*stats_and_gate(), [i]), bins=5))
    assert torch.equal(whole.totals, parts.totals)


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_rate_by_position_against_a_loop_over_tokens(bins: int) -> None:
    torch.manual_seed(0)
    stats, gate = rows(*stats_and_gate(), [0] * 20)
    mask = torch.rand(20, 5) < 0.7
    keep = torch.rand(20, 5) < 0.6
    stats, gate = (
        type(stats)(*(stats.response_ids, stats.logp, stats.rollout_logp, stats.advantages, mask)),
        type(gate)(gate.weight, keep),
    )
    sums, counts = [0.0] * bins, [0.0] * bins
    for row_mask, row_keep in zip(mask.tolist(), keep.tolist(), strict=True):
        kept = [k for m, k in zip(row_mask, row_keep, strict=True) if m]
        for p, k in enumerate(kept):
            sums[bins * p // len(kept)] += not k
            counts[bins * p // len(kept)] += 1
    totals = mask_totals(stats, gate, bins)
    for i, name in enumerate(bin_names(bins)):
        total, count = totals[f"mask/rate_at/{name}"]
        assert (float(total), float(count)) == (sums[i], counts[i])
    assert float(totals["mask/rate"][0]) == sum(sums)


def test_masked_totals_ignore_what_is_masked_even_when_it_is_not_a_number() -> None:
    total, count = masked_total(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([True, False, True]))
    assert (float(total), float(count)) == (3.0, 2.0)


def test_a_trust_region_without_a_budget_has_no_budget_totals() -> None:
    stats, gate = stats_and_gate()
    assert budget_totals(stats, type(gate)(gate.weight, gate.keep, {"divergence": gate.diagnostics["divergence"]})) == {}
