"""Callbacks in real runs of Lightning's Trainer; numbers are checked by hand and read back from TensorBoard's files."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.callbacks import (
    AIMEAccuracy,
    BudgetExhaustion,
    DataReport,
    Divergence,
    EvalAccuracy,
    GateMetrics,
    MaskRate,
    RolloutMetrics,
    RunSummary,
    TextSamples,
)
from cppo_lightning.errors import ConfigError
from cppo_lightning.metrics import Totals, masked_total
from cppo_lightning.prompts import DatasetPrompts, PromptSource
from cppo_lightning.prompts.bad_rows import BadRows, LoadCounts
from cppo_lightning.prompts.contamination import Overlap
from cppo_lightning.resume import settle_loops
from cppo_lightning.rollout.problem_sets import ProblemSet
from cppo_lightning.rollout.sampler import Rollout
from cppo_lightning.verifiers.base import Outcome, Problem
from tests.callback_rig import UPDATES, Data, Module, events, scalars, stats_and_gate, trainer

C, W, U, T, F = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TIMED_OUT, Outcome.FAILED
OUTCOMES = [[C, W, U, T], [C, C, C, C]]


class Counted(PromptSource):
    """Problem i, which the rig answers correctly i times."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        return [Problem(str(i), ({"role": "user", "content": "?"},), "0") for i in self.ids]


def fit(folder: Path, callbacks: list[Any], **settings: Any) -> Data:
    data = Data(OUTCOMES)
    trainer(folder, callbacks, **settings).fit(Module(), datamodule=data)
    return data


def test_gate_metrics_of_a_step_by_hand(tmp_path: Path) -> None:
    fit(tmp_path, [MaskRate(bins=5), Divergence(), BudgetExhaustion()], rollouts=1)
    found = scalars(tmp_path)
    values = {
        "mask/rate": 3 / 7,
        "mask/by_position": 1 / 7,
        "mask/by_budget": 2 / 7,
        "mask/toward": 2 / 7,
        "mask/rate_at/00-20": 0,
        "mask/rate_at/20-40": 0,
        "mask/rate_at/40-60": 1,  # the third token of five and the second of two
        "mask/rate_at/60-80": 0,
        "mask/rate_at/80-100": 1,
        "trust_region/divergence_mean": 2.8 / 7,
        "trust_region/divergence_max": 0.7,
        "trust_region/weighted_divergence_mean": 1.4 / 7,
        "trust_region/weighted_divergence_max": 0.35,
        "budget/exhausted_share": 1 / 2,
        "budget/spent_mean": 0.85,
        "budget/spent_max": 1.2,
        "budget/delta_b": 0.03,
        "budget/first_exhausted": 3 / 5,
        "budget/threshold": 0.07,
    }
    assert {tag for tag in found if "/" in tag} == set(values)
    for tag, value in values.items():
        assert [step for step, _ in found[tag]] == list(range(UPDATES)), tag
        assert [v for _, v in found[tag]] == pytest.approx([value] * UPDATES, abs=1e-6), tag


class FirstOfRollout(GateMetrics):
    """Has something to say at even steps only."""

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return {} if self.step % 2 else {"a": masked_total(stats.mask, stats.mask)}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step


def test_a_value_is_logged_where_it_belongs_and_nowhere_else(tmp_path: Path) -> None:
    fit(tmp_path, [FirstOfRollout(["a"])], log_every_n_steps=50)
    assert scalars(tmp_path)["a"] == [(0, 1.0), (2, 1.0)]


class TakesHalf(Module):
    """Takes no step in the second batch of a rollout."""

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.taken = batch_idx == 0
        super().training_step(batch, batch_idx)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers() if self.taken else SimpleNamespace(step=lambda: None)


class NumberIfTaken(GateMetrics):
    """The step's number, NaN for a step that will not be taken."""

    def totals(self, stats: TokenStats, gate: Gate) -> Totals:
        return {"a": (self.step, 1.0)}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = float(trainer.global_step) if batch_idx == 0 else float("nan")


def test_nothing_is_logged_of_a_step_that_was_not_taken(tmp_path: Path) -> None:
    run = trainer(tmp_path, [NumberIfTaken(["a"])], rollouts=3)
    run.fit(TakesHalf(), datamodule=Data(OUTCOMES))
    assert run.global_step == 3
    assert scalars(tmp_path)["a"] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_toward_is_worked_out_when_the_trust_region_does_not_say() -> None:
    stats, gate = stats_and_gate()  # rho = exp(0.1) and A = 1: every token moves away
    total, count = MaskRate().totals(stats, Gate(gate.weight, gate.keep))["mask/toward"]
    assert (float(total), float(count)) == (0.0, 7.0)


def test_a_trust_region_without_budget_is_told_once_and_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stats, gate = stats_and_gate()
    callback = BudgetExhaustion()
    run = trainer(tmp_path, [callback])
    with caplog.at_level("INFO", "lightning.pytorch"):
        for _ in range(2):
            callback.on_gate(run, Module(), stats, Gate(gate.weight, gate.keep))
    assert sum("no prefix budget" in r.message for r in caplog.records) == 1
    assert callback.totals(stats, Gate(gate.weight, gate.keep)) == {}


def test_rollout_metrics_by_hand(tmp_path: Path) -> None:
    fit(tmp_path, [RolloutMetrics()])
    found = scalars(tmp_path)
    values = {
        "reward": 5 / 8,
        "accuracy": 5 / 8,
        "response_length": 2.5,
        "truncated_share": 2 / 8,
        "zero_spread_share": 1 / 2,
        "verdict/correct": 5 / 8,
        "verdict/wrong": 1 / 8,
        "verdict/unparseable": 1 / 8,
        "verdict/timed_out": 1 / 8,
        "verdict/failed": 0,
        "tokens_per_second": 20 / 2.0,
        "seconds_sampling": 2.0,
        "seconds_verifying": 0.5,
    }
    for name, value in values.items():
        # once per rollout, at the steps that its weights had seen
        assert found[f"rollout/{name}"] == [(0, pytest.approx(value)), (UPDATES, pytest.approx(value))], name


def named(plain: Rollout, sets: list[str], parts: dict[str, list[float]]) -> Rollout:
    """The same samples, group g of the data set ``sets[g]`` and sample i of it with the parts' rewards i."""
    samples = []
    for group, name in zip(plain.groups(), sets, strict=True):
        for i, sample in enumerate(group):
            verdict = replace(sample.verdict, parts={part: rewards[i] for part, rewards in parts.items()})
            samples.append(replace(sample, problem=replace(sample.problem, dataset=name), verdict=verdict))
    return replace(plain, samples=samples)


def test_rollout_metrics_by_part_and_by_set(tmp_path: Path) -> None:
    data = Data(OUTCOMES)
    data.rollout = named(data.rollout, ["hard", "easy"], {"answer": [1, 0, 0, 0], "form": [0.5, 0.5, 0.5, 0.3]})
    trainer(tmp_path, [RolloutMetrics()], rollouts=1).fit(Module(), datamodule=data)
    found = scalars(tmp_path)
    expected = {"reward/answer": 1 / 4, "reward/form": 0.45, "accuracy/hard": 1 / 4, "accuracy/easy": 1, "accuracy": 5 / 8}
    for name, value in expected.items():
        assert found[f"rollout/{name}"] == [(0, pytest.approx(value))], name


class Own(Data):
    """Each rank has problems of a set, and rewards with a part, that the other has not."""

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        rank = self.trainer.global_rank
        self.rollout = named(self.rollout, [f"set{rank}"] * 2, {f"part{rank}": [rank, rank, rank, 0.0]})


@pytest.mark.slow
def test_ranks_that_have_seen_other_names_log_all_of_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}
    trainer(tmp_path, [RolloutMetrics()], rollouts=1, **settings).fit(Module(), datamodule=Own(OUTCOMES))
    found = scalars(tmp_path)
    for name, value in {"reward/part0": 0, "reward/part1": 0.75, "accuracy/set0": 5 / 8, "accuracy/set1": 5 / 8}.items():
        assert found[f"rollout/{name}"] == [(0, pytest.approx(value))], name


def test_eval_accuracy_by_hand(tmp_path: Path) -> None:
    callback = EvalAccuracy({"easy": Counted(4, 3, 4), "hard": Counted(0)}, every_n_rollouts=2, samples=4, batch_problems=2)
    data = fit(tmp_path, [callback], rollouts=3)
    found = scalars(tmp_path)
    steps = [0, 2 * UPDATES, 3 * UPDATES]  # at start, every second rollout, at the end
    for tag, value in {
        "eval/easy/avg@4": 11 / 12,
        "eval/hard/avg@4": 0,
        "eval/avg@4": 11 / 24,
        "eval/easy/pass@2": 1,
        "eval/easy/pass@4": 1,
        "eval/easy/maj@4": 1,
        "eval/hard/pass@4": 0,
        "eval/pass@4": 1 / 2,
        "eval/maj@4": 1 / 2,
        "eval/easy/avg@4_low": 3 / 4,  # of 3^3 resamples, one in 27 draws the problem with 3 of 4 three times
        "eval/easy/avg@4_high": 1,
        "eval/hard/avg@4_high": 0,
        "eval/avg@4_low": 3 / 8,
        "eval/avg@4_high": 1 / 2,
        "eval/easy/truncated_share": 1 / 4,
        "eval/easy/unparseable_share": 1 / 12,
        "eval/hard/unparseable_share": 1,
    }.items():
        assert found[tag] == [(step, pytest.approx(value)) for step in steps], tag
    assert "eval/pass@2" not in found, "another callback, for other sets, may have as many samples to draw two from"
    assert events(tmp_path).Tags()["images"] == ["eval/curves"]
    assert [image.step for image in events(tmp_path).Images("eval/curves")] == steps
    assert data.synced == 2 * 3  # the loop asks too, and finds the weights current
    assert [n for n, _ in data.sampler.asked] == [2, 1, 1] * 3
    sampling = data.sampler.asked[0][1]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.7, 0.95)


def test_a_run_that_ends_early_is_evaluated_at_its_end_and_only_once(tmp_path: Path) -> None:
    callback = EvalAccuracy({"a": Counted(1)}, every_n_rollouts=1, samples=2, at_start=False)
    fit(tmp_path, [callback], rollouts=5, max_steps=UPDATES + 1)  # ends inside the second rollout
    assert [step for step, _ in callback.history] == [UPDATES, UPDATES + 1]


def test_weights_that_have_been_evaluated_are_not_evaluated_again(tmp_path: Path) -> None:
    """A rollout whose groups all have equal rewards leaves them as they were."""
    callback = EvalAccuracy({"a": Counted(1)}, every_n_rollouts=1, samples=2)
    module = TakesHalf()
    module.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        TakesHalf.training_step(module, batch, batch_idx if module.current_epoch in (1, 4) else 1)
    )
    trainer(tmp_path, [callback], rollouts=6).fit(module, datamodule=Data(OUTCOMES))
    assert [step for step, _ in callback.history] == [0, 1, 2]
    assert [step for step, _ in scalars(tmp_path)["eval/avg@2"]] == [0, 1, 2]


def test_checkpoints_can_monitor_an_evaluation_and_a_resumed_run_keeps_the_first(tmp_path: Path) -> None:
    def callbacks() -> tuple[EvalAccuracy, ModelCheckpoint]:
        saving = ModelCheckpoint(tmp_path, "{epoch}", monitor="eval/avg@2", mode="max", save_on_train_epoch_end=True)
        return EvalAccuracy({"a": Counted(1)}, every_n_rollouts=1, samples=2), saving

    first, saving = callbacks()
    fit(tmp_path, [first, saving], rollouts=1, enable_checkpointing=True)
    assert float(torch.as_tensor(saving.best_model_score)) == 0.5
    resumed, again = callbacks()
    run = trainer(tmp_path, [resumed, again], rollouts=2, enable_checkpointing=True)
    run.fit(Module(), datamodule=Data(OUTCOMES), ckpt_path=saving.best_model_path, weights_only=True)
    assert [step for step, _ in resumed.history] == [0, UPDATES, 2 * UPDATES]


def test_aime_accuracy_is_a_preset() -> None:
    callback = AIMEAccuracy(every_n_rollouts=5)
    assert isinstance(callback, EvalAccuracy)
    assert list(callback.datasets) == ["aime24", "aime25", "aime26"]
    assert all(isinstance(source, DatasetPrompts) for source in callback.datasets.values())
    assert (callback.samples, callback.temperature, callback.top_p) == (16, 0.7, 0.95)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": {}}, "datasets must name at least one set"),
        ({"datasets": {"a/b": Counted(1)}}, "without '/'"),
        ({"datasets": {"..": Counted(1)}}, "no '.' first"),
        ({"every_n_rollouts": 0}, "every_n_rollouts must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"temperature": 0}, "samples must be 1 at temperature 0"),
        ({"top_p": 0}, "top_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalAccuracy(**{"datasets": {"a": Counted(1)}, **settings})


def test_callbacks_that_need_a_sampling_datamodule_say_so(tmp_path: Path) -> None:
    loader = Data(OUTCOMES).train_dataloader()
    for callback in (EvalAccuracy({"a": Counted(1)}), RolloutMetrics(), TextSamples()):
        with pytest.raises(ConfigError, match="needs a RolloutDataModule"):
            trainer(tmp_path, [callback]).fit(Module(), loader)


def test_two_evaluations_that_would_log_the_same_tag_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two callbacks would log eval/avg@16"):
        fit(tmp_path, [EvalAccuracy({"a": Counted(1)}), AIMEAccuracy({"b": Counted(1)})])
    with pytest.raises(ConfigError, match=r"two callbacks would log eval/b/\.\.\."):
        fit(tmp_path, [EvalAccuracy({"a": Counted(1), "b": Counted(1)}), AIMEAccuracy({"b": Counted(1)}, samples=4)])


@pytest.mark.parametrize(
    ("tick", "split"),
    [(1.0, "sampling 0.5, verifying 0.5"), (0.1, "sampling 0.0, verifying 0.1")],
    ids=["in turn", "drawn ahead: most of its 0.5 s were over before it was wanted"],
)
def test_run_summary(
    tick: float, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves by ``tick`` seconds whenever the callback looks; the rig's rollouts waited 0.5 s for verdicts."""
    clock = SimpleNamespace(perf_counter=map(lambda n: n * tick, itertools.count()).__next__)
    monkeypatch.setattr("cppo_lightning.callbacks.run_summary.time", clock)
    monkeypatch.setenv("COLUMNS", "120")
    commands = ["python -m cppo_lightning fit --config :100:" + "x" * 150]
    callbacks = [EvalAccuracy({"sums": Counted(1, 2)}, samples=2), RunSummary(next_commands=commands)]
    fit(tmp_path, callbacks)
    printed = capsys.readouterr().out
    assert f"0.750 at step 0  ->  0.750 at step {2 * UPDATES}" in printed
    assert f"2, {2 * UPDATES}" in printed
    assert f"{split}, updating {UPDATES * tick:.1f}" in printed
    assert "42.86% of tokens (first rollout 42.86%, last 42.86%)" in printed
    assert f"--logdir {tmp_path / 'run'}" in printed
    assert f"\n  {commands[0]}\n" in printed, "a command stays on one line, and as it is"


def test_run_summary_of_a_run_that_goes_on_inside_a_rollout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of that rollout counts and has no seconds: nobody saw it begin."""
    module = Module()
    monkeypatch.setattr(module, "on_save_checkpoint", settle_loops)  # what this package's own module does
    run = trainer(tmp_path, [], max_steps=1)
    run.fit(module, datamodule=Data(OUTCOMES))
    run.save_checkpoint(tmp_path / "inside.ckpt")
    clock = SimpleNamespace(perf_counter=itertools.count(86853.0).__next__)
    monkeypatch.setattr("cppo_lightning.callbacks.run_summary.time", clock)
    monkeypatch.setenv("COLUMNS", "120")
    for rollouts, seconds in ((1, None), (3, f"{UPDATES + 1:.1f} (sampling 0.5, verifying 0.5, updating {UPDATES:.1f})")):
        again = trainer(tmp_path, [RunSummary()], rollouts)
        again.fit(Module(), datamodule=Data(OUTCOMES), ckpt_path=tmp_path / "inside.ckpt", weights_only=True)
        printed = capsys.readouterr().out
        assert f"{rollouts}, {rollouts * UPDATES}" in printed
        assert (seconds in printed) if seconds else ("seconds" not in printed)


def test_run_summary_counts_the_rollouts_of_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path, [])
    first.fit(Module(), datamodule=Data(OUTCOMES))
    first.save_checkpoint(tmp_path / "two.ckpt")
    again = trainer(tmp_path, [RunSummary()], rollouts=5)
    again.fit(Module(), datamodule=Data(OUTCOMES), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert f"5, {5 * UPDATES}" in capsys.readouterr().out


def test_nothing_that_a_data_set_calls_its_problems_is_markup_or_drives_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;mine\x07\n\n# big <b>x</b>\u202e"
    pairs = [Overlap(f"t{evil}", f"e{evil}", 1.0, True)]
    held = ProblemSet(["held"], [], "f", LoadCounts(), evil, overlaps=pairs)
    data = Data(OUTCOMES)
    trained = ProblemSet(["training"], [], "f", LoadCounts(), "")
    data.sets = SimpleNamespace(training=trained, evaluations={"held": held})  # type: ignore[attr-defined]
    trainer(tmp_path, [DataReport()], rollouts=1).fit(Module(), datamodule=data)
    text = events(tmp_path).Tensors("data/report/text_summary")[0].tensor_proto.string_val[0].decode()
    for shown in (capsys.readouterr().out, text):
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert "'e\\x1b]0;mine\\x07\\n\\n# big <b>x</b>\\u202e' = 't" in shown
    notes = text.split("\n\n")[1].split("\n")
    assert len(notes) == 2
    assert all(note.startswith("    held") for note in notes)


def test_run_summary_without_anything_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = Data(OUTCOMES).train_dataloader()
    trainer(tmp_path, [RunSummary()], logger=CSVLogger(tmp_path), max_steps=0).fit(Module(), loader)
    assert "0, 0" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_log_what_one_rank_logs(tmp_path: Path) -> None:
    def run(folder: Path, devices: int) -> dict[str, list[tuple[int, float]]]:
        callbacks = [
            MaskRate(),
            Divergence(),
            BudgetExhaustion(),
            RolloutMetrics(),
            EvalAccuracy({"odd": Counted(4, 3, 1), "one": Counted(2)}, samples=4),  # ranks do not divide these
        ]
        fit(
            folder,
            callbacks,
            rollouts=1,
            devices=devices,
            use_distributed_sampler=False,
            strategy="ddp_spawn" if devices > 1 else "auto",
        )
        return scalars(folder)

    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert set(one) == set(two)
    for tag in set(one) - {"eval/seconds", "rollout/tokens_per_second"}:
        assert two[tag] == [(step, pytest.approx(value, abs=1e-7)) for step, value in one[tag]], tag
    # each rank of the rig samples the same 20 tokens in 2 seconds
    assert two["rollout/tokens_per_second"] == [(0, pytest.approx(2 * one["rollout/tokens_per_second"][0][1]))]
