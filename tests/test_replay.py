"""A recording holds what the trust region saw and said, bit by bit; replay compares trust regions as a slow count does."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from matplotlib.image import imread

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import MaskRate, RolloutRecorder
from cppo_lightning.cli import main
from cppo_lightning.divergences import TopKKL, TopKTV
from cppo_lightning.errors import ConfigError
from cppo_lightning.figures.numbers import RegionsAgreement, RegionsByPosition
from cppo_lightning.figures.replay import draw_agreement, draw_gradient_by_position, draw_kept_by_position
from cppo_lightning.mismatch import TruncatedImportance
from cppo_lightning.replay import reading
from cppo_lightning.replay.layout import BY_TOKEN, LISTS, SCHEMA, TOP_K, Recorded
from cppo_lightning.replay.reading import read
from cppo_lightning.replay.regions import made_from, settings_of
from cppo_lightning.replay.replaying import AS_RECORDED, replay
from cppo_lightning.replay.run_card import parts_of, read_card
from cppo_lightning.rollout import RolloutPlan, Sampling
from cppo_lightning.trust_regions import CPPO, TRM, Intersection, PPOClip, TrustRegion
from tests import oracles
from tests.callback_rig import scalars, trainer
from tests.conftest import REPOSITORY
from tests.rank_rig import on_ranks
from tests.test_fit import make_data, make_module
from tests.test_strategies import STRATEGIES, TOLERANCE

TRUST_REGIONS = REPOSITORY / "configs" / "trust_region"
REPLAY = "python -m cppo_lightning replay "
DOCS = (REPOSITORY / "docs" / "replay.md").read_text()


@dataclass
class Seen:
    """One gate of a run, by the response's own tokens."""

    step: int
    keep: list[bool]
    weight: list[float]
    logp: list[float]
    topk_logp: list[float]


class Notes(Callback):
    """Writes down every gate, response by response."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int, tuple[int, ...]], Seen] = {}  # (rollout, sample, response)

    def on_gate(self, trainer: Any, pl_module: Any, stats: TokenStats, gate: Gate) -> None:
        assert stats.sample is not None
        for row, mask in enumerate(stats.mask):
            if mask.any():
                place = (trainer.current_epoch, int(stats.sample[row]), tuple(stats.response_ids[row][mask].tolist()))
                top = [] if stats.topk_logp is None else stats.topk_logp[row][mask].flatten().tolist()
                values = (gate.keep[row][mask], gate.weight[row][mask], stats.logp[row][mask])
                keep, weight, logp = (v.tolist() for v in values)
                self.seen[place] = Seen(trainer.global_step, keep, weight, logp, top)


def record(path: Path, folder: Path, rollouts: int = 2, devices: int = 1, **settings: Any) -> dict[Any, Seen]:
    """A run with responses of 1 to 24 tokens in micro-batches of several, recorded in ``folder / "run"``; its gates."""
    notes, region = Notes(), settings.get("trust_region", CPPO(TopKTV(5)))
    module = make_module(path, **{"micro_batch_tokens": 300, "trust_region": region, **settings})
    data = make_data(path, plan=RolloutPlan(4, 8, 2), sampling=Sampling(max_tokens=24), top_k=region.top_k)
    recorder = RolloutRecorder(every_n_rollouts=1, keep=None)
    run = trainer(folder, [notes, MaskRate(), recorder], rollouts, devices=devices, strategy="ddp" if devices > 1 else "auto")
    try:
        run.fit(module, datamodule=data)
    finally:
        data.close()
    return notes.seen


def record_on_a_rank(path: Path, folder: Path) -> dict[Any, Seen]:
    return record(path, folder, devices=2)


def recorded(folder: Path) -> list[Recorded]:
    return [part for paths in parts_of(folder / "run" / "recording").values() for file in paths for part in read(file)]


def config(folder: Path, region: Any, name: str = "own") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"model": {"trust_region": region if isinstance(region, dict) else settings_of(region)}}))
    return file


OWN: dict[str, TrustRegion] = {
    "adaptive": CPPO(TopKTV(5)),
    "fixed": CPPO(TopKTV(5), delta=0.02, delta_b=0.001, adaptive=False),
    "clip": PPOClip(),
    "trm": TRM("max", delta=0.02, divergence=TopKKL(5)),
}


@dataclass(frozen=True)
class Run:
    folder: Path
    region: TrustRegion
    seen: dict[Any, Seen]

    @property
    def recording(self) -> Path:
        return self.folder / "run" / "recording"


@pytest.fixture(scope="module")
def runs(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run with each trust region, made when first asked for."""
    made: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Run(folder, OWN[name], record(tiny_model_path, folder, trust_region=OWN[name]))
        return made[name]

    return get


def same_as_seen(folder: Path, seen: Sequence[dict[Any, Seen]], region: TrustRegion | None) -> int:
    """Compare what was recorded, and what ``region`` says of it, with what the callbacks of each rank saw; tokens."""
    tokens, left = 0, [dict(of_rank) for of_rank in seen]
    for part in recorded(folder):
        gates = [part.gate] + ([] if region is None else [region(part.stats)])
        for row, mask in enumerate(part.batch.response_mask):
            assert part.batch.sample is not None
            response = tuple(part.batch.response_ids[row][mask].tolist())
            was = left[part.place.rank].pop((part.place.rollout, int(part.batch.sample[row]), response))
            assert part.place.step == was.step
            assert part.logp[row][mask].tolist() == was.logp
            assert was.topk_logp == ([] if part.topk_logp is None else part.topk_logp[row][mask].flatten().tolist())
            for gate in gates:
                assert gate.keep[row][mask].tolist() == was.keep
                assert gate.weight[row][mask].tolist() == was.weight
            tokens += len(response)
    assert not any(left), "all that was trained on is recorded"
    return tokens


def same_as_logged(folder: Path, own: Path) -> None:
    """Replay's ``mask/*`` of the run's own trust region are the numbers in TensorBoard, which has float32."""
    found = replay(folder / "run" / "recording", [own])
    logged = scalars(folder)
    updates = found.comparison.updates
    tags = [tag for tag in logged if tag.startswith("mask/") and "_at/" not in tag]
    assert {"mask/rate", "mask/toward"} <= set(tags)
    for tag in tags:
        values = [(update.step, float(np.float32(update.rates["own"][tag]))) for update in updates]
        assert values == logged[tag]
    rates = [float(np.float32(update.rates[AS_RECORDED]["mask/rate"])) for update in updates]
    assert rates == [value for _, value in logged["mask/rate"]]
    assert max(rates) > 0.05, "the trust region has dropped something"
    again = found.again
    assert again is not None
    assert (again.unlike_the_run, again.other_weights) == (0, 0)


@pytest.mark.parametrize("name", OWN)
def test_the_trust_region_that_made_it_decides_as_it_did(runs: Callable[[str], Run], name: str, tmp_path: Path) -> None:
    run = runs(name)
    assert same_as_seen(run.folder, [run.seen], run.region) > 500
    assert any(len(part.batch) > 2 for part in recorded(run.folder)), "responses of other lengths are padded"
    same_as_logged(run.folder, config(tmp_path, run.region))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_recorded_tokens_are_decided_as_by_the_slow_oracles(runs: Callable[[str], Run], name: str) -> None:
    """Real tokens behind real steps; what float32 cannot tell is left out, which is next to nothing."""
    build, oracle = STRATEGIES[name]
    region, told, moved = build(5), 0, 0.0
    for part in recorded(runs("adaptive").folder):
        gate = region(part.stats)
        for row, response in enumerate(oracles.tokens(part.stats)):
            own = part.stats.mask[row]
            decided = zip(gate.keep[row][own].tolist(), gate.weight[row][own].tolist(), oracle(response, 5), strict=True)
            for keep, weight, wanted in decided:
                if wanted.margin > TOLERANCE:
                    assert keep == wanted.keep
                    assert weight == pytest.approx(wanted.weight, rel=1e-5)
                    told += 1
            moved = max(moved, *(abs(token.rho - 1) for token in response))
    assert told > 0.9 * sum(len(values.keep) for values in runs("adaptive").seen.values())
    assert moved > 0.5


def test_on_two_ranks(tiny_model_path: Path, tmp_path: Path) -> None:
    found = on_ranks(2, record_on_a_rank, tiny_model_path, tmp_path)
    assert all(found), "both trained"
    assert same_as_seen(tmp_path, found, CPPO(TopKTV(5))) > 500
    same_as_logged(tmp_path, config(tmp_path, CPPO(TopKTV(5))))


def test_what_started_at_pi_old_is_replayed_so(tiny_model_path: Path, tmp_path: Path) -> None:
    """The correction is in the weights; a trust region against mu sees mu."""
    settings = {"anchor": "recomputed", "mismatch": TruncatedImportance(1.0), "trust_region": PPOClip(0.1, 0.1)}
    seen = record(tiny_model_path, tmp_path, **settings)
    assert same_as_seen(tmp_path, [seen], None) > 500
    same_as_logged(tmp_path, config(tmp_path, PPOClip(0.1, 0.1)))
    found = replay(tmp_path / "run" / "recording", [config(tmp_path, PPOClip(0.1, 0.1))])
    assert found.comparison.regions["own"].other_weights == 0
    parts = recorded(tmp_path)
    uncorrected = sum(int((PPOClip(0.1, 0.1)(part.stats).weight != part.gate.weight).sum()) for part in parts)
    assert uncorrected > 0, "mu and pi_old differ"


# the numbers ----------------------------------------------------------------------------------------------------------------


def test_comparison_is_a_count(runs: Callable[[str], Run], tmp_path: Path) -> None:
    """Read as a user would, with pandas, and counted token by token."""
    run, slices = runs("fixed"), 4
    others = {"clip": PPOClip(), "trm": TRM("max", delta=0.02, divergence=TopKKL(5))}
    found = replay(run.recording, [config(tmp_path, region, name) for name, region in others.items()], slices).comparison
    frame = pd.read_parquet(run.recording / "rollouts")
    assert len(frame) == found.responses
    keep: dict[str, list[bool]] = {AS_RECORDED: [bool(k) for row in frame["keep"] for k in row], "clip": [], "trm": []}
    places, pull = [], []  # slice, and weight |A| as recorded
    for row in frame.itertuples():
        length = len(row.response_ids)  # type: ignore[arg-type]
        divergence = 0.0
        for t in range(length):
            ratio = math.exp(row.logp[t] - row.rollout_logp[t])  # type: ignore[index]
            up, down = row.advantage > 0 and ratio > 1.28, row.advantage < 0 and ratio < 0.8  # type: ignore[operator]
            keep["clip"].append(not (up or down))
            places.append(slices * t // length)
            pull.append(float(row.weight[t]) * abs(row.advantage))  # type: ignore[index,arg-type]
            divergence = max(divergence, slow_kl(row, t))
        keep["trm"] += [divergence <= 0.02] * length
    names = [AS_RECORDED, "clip", "trm"]
    assert found.tokens == len(places)
    for i, a in enumerate(names):
        region = found.regions[a]
        assert region.dropped == pytest.approx(1 - np.mean(keep[a]), rel=1e-12)
        assert region.unlike_the_run == sum(x != y for x, y in zip(keep[a], keep[AS_RECORDED], strict=True))
        for s in range(slices):
            assert region.kept_at[s] == pytest.approx(np.mean([k for k, p in zip(keep[a], places, strict=True) if p == s]))
        for j, b in enumerate(names):
            assert found.alike[i][j] == pytest.approx(np.mean(np.array(keep[a]) == np.array(keep[b])))
            dropped = ~np.array(keep[a])
            assert found.dropped[i][j] == pytest.approx((dropped & ~np.array(keep[b])).sum() / dropped.sum())
    mine = found.regions[AS_RECORDED]
    assert mine.gradient == pytest.approx(np.mean(pull), rel=1e-6)  # float32 products
    for s in range(slices):
        part = sum(value for value, p in zip(pull, places, strict=True) if p == s)
        assert mine.gradient_at[s] == pytest.approx(part / sum(pull), rel=1e-6)


def slow_kl(row: Any, t: int, k: int = 5) -> float:
    """KL(mu || pi) over the top k tokens, the sampled one if it is not among them, and all others."""
    ids = row.topk_ids.reshape(-1, k)[t].tolist()
    mu, pi = (np.exp(values.reshape(-1, k)[t].astype(float)) for values in (row.topk_rollout_logp, row.topk_logp))
    bins = list(zip(mu, pi, strict=True))
    if row.response_ids[t] not in ids:
        bins.append((math.exp(row.rollout_logp[t]), math.exp(row.logp[t])))
    bins.append((1 - sum(m for m, _ in bins), 1 - sum(p for _, p in bins)))
    return sum(m * math.log(m / p) for m, p in bins)


def test_pictures_show_the_numbers() -> None:
    shares = np.array([[1.0, 0.5, np.nan], [0.2, 0.4, 0.6]])
    (axes,) = draw_kept_by_position(RegionsByPosition(("a", "b"), shares, "3 tokens")).axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[1.0, 0.5], [0.2, 0.4, 0.6]]
    matrices = draw_agreement(RegionsAgreement(("a", "b"), shares[:, :2], np.array([[1, 0.25], [np.nan, 1]]), "")).axes
    texts = [[text.get_text() for text in axes.texts][-4:] for axes in matrices]
    assert texts == [["100.0%", "50.0%", "20.0%", "40.0%"], ["100.0%", "25.0%", "none", "100.0%"]]


def test_a_single_slice_is_seen() -> None:
    for draw in (draw_kept_by_position, draw_gradient_by_position):
        (axes,) = draw(RegionsByPosition(("a", "b"), np.array([[1.0], [0.2]]), "3 tokens")).axes
        assert [line.get_marker() for line in axes.lines] == ["o", "o"]


# which files there are ------------------------------------------------------------------------------------------------------


def rollouts_after(folder: Path, path: Path, rollouts: int, **settings: Any) -> list[tuple[int, int]]:
    data = make_data(path)
    run = trainer(folder, [RolloutRecorder(dirpath=str(folder / "kept"), **settings)], rollouts)
    run.fit(make_module(path), datamodule=data)
    data.close()
    return list(parts_of(folder / "kept"))


def test_every_nth_rollout_the_latest_ones(tiny_model_path: Path, tmp_path: Path) -> None:
    assert rollouts_after(tmp_path, tiny_model_path, 4, every_n_rollouts=2, keep=1) == [(2, 0), (2, 1)]
    # a run that begins anew in the folder leaves nothing of what comes after its own beginning
    assert rollouts_after(tmp_path, tiny_model_path, 1, every_n_rollouts=1) == [(0, 0), (0, 1)]
    assert read_card(tmp_path / "kept").every_n_rollouts == 1


def test_a_run_that_goes_on_records_on(tiny_model_path: Path, tmp_path: Path) -> None:
    """From the middle of a rollout: what was recorded before stays, and all is as in a run that was left alone."""

    def fit(steps: int, resume: Path | None = None) -> dict[str, list[Any]]:
        data = make_data(tiny_model_path)
        recorder = RolloutRecorder(every_n_rollouts=1, dirpath=str(tmp_path / "kept"))
        run = trainer(tmp_path, [recorder], -1, max_steps=steps)
        run.fit(make_module(tiny_model_path), datamodule=data, ckpt_path=resume, weights_only=True)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        data.close()
        frame = pd.read_parquet(tmp_path / "kept" / "rollouts")
        return {name: [list(v) if isinstance(v, np.ndarray) else v for v in frame[name]] for name in frame}

    whole = fit(4)
    first = fit(1)
    assert set(first["step"]) == {0}
    assert fit(4, tmp_path / "1.ckpt") == whole
    assert set(whole["step"]) == {0, 1, 2, 3}


@pytest.mark.parametrize(("settings", "key"), [({"every_n_rollouts": 0}, "every_n_rollouts"), ({"keep": 0}, "keep")])
def test_numbers_of_the_recorder_are_checked(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"RolloutRecorder.{key} must be at least 1.* got 0"):
        RolloutRecorder(**settings)


# the command ----------------------------------------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.trust_regions import TrustRegion

@dataclass(frozen=True)
class Early(TrustRegion):
    tokens: int = 3

    def __call__(self, stats: TokenStats) -> Gate:
        keep = stats.mask & (stats.mask.cumsum(-1) <= self.tokens)
        return Gate(weight=2.0 * keep, keep=keep)
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's, which the command line finds modules in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_command_with_a_trust_region_of_the_users_own(
    runs: Callable[[str], Run], user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (user / "early_tokens.py").write_text(MINE)
    config(user, {"class_path": "early_tokens.Early", "init_args": {"tokens": 2}}, "early")
    run = runs("adaptive").folder / "run"
    main(["replay", str(run), "--config", "early.yaml", "--config", str(TRUST_REGIONS / "gspo.yaml"), "--sample", "1"])
    shown = capsys.readouterr().out
    assert "every decision and, bit by bit, every weight" in " ".join(shown.split())
    held = json.loads((run / "replay" / "replay.json").read_text())
    assert list(held["comparison"]["regions"]) == [AS_RECORDED, "early", "gspo"]
    assert all(name in shown for name in held["comparison"]["regions"])
    for name in ("kept_by_position", "gradient_by_position", "agreement"):
        assert imread(run / "replay" / f"{name}.png").shape[2] == 4
    sample, part = held["sample"], recorded(run.parent)[0]
    assert sample["token_ids"] == part.batch.response_ids[1][part.batch.response_mask[1]].tolist()
    length = len(sample["token_ids"])
    assert sample["weight"]["early"] == [2.0] * min(2, length) + [0.0] * max(0, length - 2)
    assert sample["keep"][AS_RECORDED] == part.gate.keep[1, :length].tolist()
    assert len(sample["texts"]) == length, "the tokenizer is there"
    assert sample["mu"] == pytest.approx(part.batch.rollout_logp[1, :length].exp().tolist())


def test_the_run_does_not_choose_what_is_imported(runs: Callable[[str], Run], user: Path) -> None:
    """A recording that names a class from elsewhere, as one of a user's own trust region does, is read without it."""
    (user / "elsewhere.py").write_text("raise SystemExit('imported')")
    foreign = copy_of(runs("clip"), user)
    held = json.loads((foreign / "run.json").read_text())
    region = {"class_path": "elsewhere.Region", "init_args": {}}
    for hidden in (region, settings_of(Intersection([PPOClip()])) | {"init_args": {"trust_regions": [region]}}):
        (foreign / "run.json").write_text(json.dumps({**held, "trust_region": hidden}))
        found = replay(foreign, [])
        assert found.again is None
        assert found.comparison.responses > 0
    assert "elsewhere" not in sys.modules


def copy_of(run: Run, folder: Path) -> Path:
    """Its recording with the first file only."""
    place = folder / "copy"
    (place / "rollouts" / "rank0").mkdir(parents=True)
    (place / "run.json").write_text((run.recording / "run.json").read_text())
    (file,) = next(iter(parts_of(run.recording).values()))
    (place / "rollouts" / "rank0" / file.name).write_bytes(file.read_bytes())
    return place


def broken(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        with pq.ParquetFile(file) as held:
            groups = [held.read_row_group(i) for i in range(held.num_row_groups)]
        first, *rest = [change(groups[0]), *groups[1:]]
        with pq.ParquetWriter(file, first.schema) as writer:
            for table in (first, *rest):
                writer.write_table(table.cast(first.schema) if table.schema.names == first.schema.names else first)

    return rewrite


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    i, field = SCHEMA.get_field_index(name), SCHEMA.field(name)
    return lambda rows: rows.set_column(i, field, pa.array(change(rows[name].to_pylist()), field.type))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "cannot be read"),
    "no parquet": (lambda file: file.write_bytes(b"hello" * 100), "cannot be read"),
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:-3000]), "cannot be read"),
    "damaged": (
        lambda file: file.write_bytes(file.read_bytes()[:200] + b"\xff" * 5000 + file.read_bytes()[5200:]),
        "",
    ),
    "a column less": (broken(lambda rows: rows.drop_columns(["keep"])), "other columns than a recording, by 'keep' for one"),
    "a column more": (broken(lambda rows: rows.append_column("x", rows["row"])), "by 'x' for one"),
    "float64": (
        broken(lambda rows: rows.cast(SCHEMA.set(9, pa.field("group", pa.float64())))),
        "by 'group' for one",
    ),
    "a row less": (broken(lambda rows: rows.slice(1)), "micro-batch 0 that is not whole"),
    "rows swapped": (broken(lambda rows: rows.take([1, 0, *range(2, len(rows))])), "micro-batch 0 that is not whole"),
    "a token less": (broken(with_column("logp", lambda v: [v[0][1:], *v[1:]])), "column 'logp' that do not go with"),
    "a top-K entry less": (broken(with_column("topk_logp", lambda v: [v[0][1:], *v[1:]])), "column 'topk_logp' that do not"),
    "no top-K ids": (broken(with_column("topk_ids", lambda v: [None] * len(v))), "a part of the top-K entries"),
    "a missing number": (
        broken(with_column("weight", lambda v: [[None, *v[0][1:]], *v[1:]])),
        "lacks values in column 'weight'",
    ),
    "a negative id": (broken(with_column("response_ids", lambda v: [[-1, *v[0][1:]], *v[1:]])), "negative id in column 'resp"),
    "a huge padding": (broken(with_column("width", lambda v: [2**31 - 1] * len(v))), "2147483647 padded tokens"),
    "nothing trainable": (broken(with_column("mask", lambda v: [[False] * len(v[0]), *v[1:]])), "end with a trainable token"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_recording_are_refused(runs: Callable[[str], Run], tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    recording = copy_of(runs("adaptive"), tmp_path)
    (file,) = parts_of(recording)[0, 0]
    assert list(read(file))
    change(file)
    with pytest.raises(ConfigError, match=rf"recording: .*000000-000\.parquet.*{message}"):
        list(read(file))


def test_a_file_that_claims_more_than_it_can_hold_is_refused(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million equal ids take a few bytes; with the limits of a file a hundred times as large."""
    monkeypatch.setattr(reading, "_VALUES", 1000)
    monkeypatch.setattr(reading, "_VALUES_PER_BYTE", 4)
    (file,) = parts_of(copy_of(runs("adaptive"), tmp_path))[0, 0]
    assert list(read(file))
    broken(with_column("prompt_ids", lambda v: [np.full(1_000_000, 7, np.int32), *v[1:]]))(file)
    with pytest.raises(ConfigError, match=r"000000-000\.parquet.* claims .* 10\d{5} values in \d{5} bytes"):
        list(read(file))


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["replay", *args])
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert len(shown.splitlines()) == 1
    return shown


def test_what_cannot_be_is_refused_in_one_line(
    runs: Callable[[str], Run], user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, cppo = (str(runs(name).folder / "run") for name in ("clip", "adaptive"))
    (user / "empty.yaml").write_text("trainer: {devices: 1}\n")
    (user / "torn.yaml").write_text("model: {trust_region: [\n")
    config(user, {"class_path": "cppo_lightning.trust_regions.CPPO", "init_args": {"delta": -1}}, "negative")
    config(user, {"class_path": "cppo_lightning.trust_regions.CPPO", "init_args": {"detla": 1}}, "misspelt")
    config(user, {"class_path": "cppo_lightning.divergences.TopKTV"}, "divergence")
    config(user, CPPO(TopKTV(6)), "six")
    responses = sum(len(part.batch) for part in recorded(runs("clip").folder))
    wrong = {
        "'nowhere' holds no recording/run.json": ["nowhere"],
        "'missing.yaml' cannot be read: .*No such file": [clip, "--config", "missing.yaml"],
        "'empty.yaml' has no model.trust_region": [clip, "--config", "empty.yaml"],
        "'torn.yaml' cannot be read": [clip, "--config", "torn.yaml"],
        "negative.yaml': model.trust_region: CPPO.delta must be above 0 .* got -1": [clip, "--config", "negative.yaml"],
        "misspelt.yaml': model.trust_region: .*detla": [clip, "--config", "misspelt.yaml"],
        "divergence.yaml': model.trust_region: .*TopKTV": [clip, "--config", "divergence.yaml"],
        "six: it reads the top 6 tokens of mu, and the top 5 were recorded;": [cppo, "--config", "six.yaml"],
        "cppo: it reads the top 20 tokens of mu, and the top 0 were recorded;": [clip, f"--config={TRUST_REGIONS}/cppo.yaml"],
        "'six' is taken": [cppo, "--config", "six.yaml", "--config", "six.yaml"],
        f"--sample {responses}: the recording has {responses} responses": [clip, "--sample", str(responses)],
        "--sample -1: the recording has": [clip, "--sample", "-1"],
        "--slices must be from 1 to 100, got 0": [clip, "--slices", "0"],
    }
    for message, args in wrong.items():
        assert re.search(message, refused(args, capsys)), message
    recording = copy_of(runs("clip"), user)
    known = json.loads((recording / "run.json").read_text())
    others = ({"format": 2}, {"trust_region": "x"}, {"mismatch": 3}, {"top_k": "\x1b[31m"})
    for text in ("[]", "{", '{"format": 1}', *(json.dumps(known | other) for other in others)):
        (recording / "run.json").write_text(text)
        assert "run.json" in refused([str(recording)], capsys)


@pytest.mark.parametrize("file", sorted(TRUST_REGIONS.glob("*.yaml")), ids=lambda file: file.stem)
def test_settings_make_the_same_trust_region_again(file: Path) -> None:
    region = made_from(yaml.safe_load(file.read_text())["model"]["trust_region"], TrustRegion, file.stem)
    written = json.loads(json.dumps(settings_of(region)))
    assert made_from(written, TrustRegion, file.stem) == region
    assert written == settings_of(region), "what it is made from stays as it was, to be written down"


# docs/replay.md -------------------------------------------------------------------------------------------------------------


def test_the_documented_columns_are_those_of_the_files() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", DOCS, re.MULTILINE))
    kinds = {name: str(SCHEMA.field(name).type) for name in SCHEMA.names}
    assert table == {name: kind.replace("list<item: ", "list of ").removesuffix(">") for name, kind in kinds.items()}
    assert set(LISTS) >= {*BY_TOKEN, *TOP_K}


def test_the_documented_commands(
    runs: Callable[[str], Run], user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit's configuration parses; replay runs on a recording with the same top-K as the documented one."""
    blocks = dict(re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", DOCS, re.DOTALL))
    for name, text in blocks.items():
        (user / name).write_text(text)
    (user / "configs").symlink_to(REPOSITORY / "configs")
    (user / "runs" / "debug").mkdir(parents=True)
    (user / "runs" / "debug" / "version_0").symlink_to(runs("clip").folder / "run")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]
    assert [command.split()[3] for command in commands] == ["fit", "replay", "replay"]
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(commands[0])[3:], "--print_config"])
    printed = capsys.readouterr()
    assert end.value.code in (0, None), printed.err
    callbacks = yaml.safe_load(printed.out)["trainer"]["callbacks"]
    assert [c["init_args"]["every_n_rollouts"] for c in callbacks if c["class_path"].endswith("RolloutRecorder")] == [1]
    for command in commands[1:]:
        main(shlex.split(command)[3:])
    (one_line,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    found: dict[str, Any] = {}
    exec(one_line, found)
    assert len(found["rows"]) == sum(len(part.batch) for part in recorded(runs("clip").folder))
    assert torch.is_tensor(recorded(runs("clip").folder)[0].logp)
