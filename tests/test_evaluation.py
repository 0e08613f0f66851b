"""Evaluations: each problem once on any number of ranks, scores that follow from the kept answers, in ``validate`` too."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from cppo_lightning.callbacks import EvalAccuracy, EvaluationReport, FailureCheckpoint, RunSummary, Shutdown
from cppo_lightning.callbacks.evaluation_report import score_table
from cppo_lightning.engines.engine import Completion, Sampling
from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.estimators import avg_at, interval, pass_at, resampled_means
from cppo_lightning.interrupts import INTERRUPTS
from cppo_lightning.prompts import PromptSource, ReasoningGymPrompts
from cppo_lightning.rollout.answers import conclude
from cppo_lightning.rollout.evaluation import Evaluation, EvaluationStream
from cppo_lightning.rollout.sampler import Rollout, Sample
from cppo_lightning.rollout.scores import Scores, score
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict
from tests.callback_rig import Module, scalars
from tests.rank_rig import on_ranks
from tests.test_ahead import plan, same
from tests.test_fit import SUMS, make_data, make_module, make_trainer, weights
from tests.test_guards import fit, send

SET = ReasoningGymPrompts("basic_arithmetic", 3, params=SUMS)
TWO_SETS: dict[str, PromptSource] = {"first": SET, "second": ReasoningGymPrompts("basic_arithmetic", 2, seed=5, params=SUMS)}
NAMES_OF_16 = ("avg@16", "pass@2", "pass@4", "pass@8", "pass@16", "maj@16")
OUTCOMES = [Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE]


def problems(name: str, count: int) -> list[Problem]:
    return [Problem(f"{name}{i}", ({"role": "user", "content": f"{i}?"},), str(i)) for i in range(count)]


class Fake:
    """Samples what follows from problem and sample alone, so that ranks do not matter."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.synced = 0

    @property
    def sampler(self) -> Any:
        return self

    def sync_weights(self) -> None:
        self.synced += 1

    def draw_seed(self, *purpose: str | int) -> int:
        return len(purpose)

    def sample(self, some: Sequence[Problem], n: int, sampling: Sampling, seed: int) -> Rollout:
        self.asked += [problem.id for problem in some]
        return Rollout([self._sample(problem, i) for problem in some for i in range(n)], n, 7, 0.0, 0.0)

    def _sample(self, problem: Problem, i: int) -> Sample:
        chance = hashlib.sha256(f"{problem.id}/{i}".encode()).digest()
        outcome = OUTCOMES[chance[0] % 3]
        answer = (
            None
            if outcome is Outcome.UNPARSEABLE
            else problem.answer
            if outcome is Outcome.CORRECT
            else str(100 + chance[1] % 2)
        )
        completion = Completion(torch.zeros(chance[2] % 5), torch.zeros(chance[2] % 5), finished=bool(chance[3] % 2))
        return Sample(problem, [1], completion, f"it is {answer}", Verdict(outcome, float(outcome is Outcome.CORRECT), answer))


SETS = {"odd": problems("a", 7), "one": problems("b", 1), "even": problems("c", 4)}


def stream(rank: int, count: int, data: Fake | None = None) -> EvaluationStream:
    evaluation = Evaluation(datasets=dict.fromkeys(SETS, SET), samples=4, batch_prompts=2)
    return EvaluationStream(SETS, evaluation, (rank, count), 7, data or Fake())


def concluded(rank: int, count: int, folder: Path) -> Scores:
    return conclude([row for batch in stream(rank, count) for row in batch.rows()], 4, 7, folder)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_gives_as_many_batches_and_every_problem_once(ranks: int) -> None:
    data = Fake()
    streams = [stream(rank, ranks, data) for rank in range(ranks)]
    lengths = {len(list(part)) for part in streams} | {len(part) for part in streams}
    assert lengths == {sum(-(-len(some) // (2 * ranks)) for some in SETS.values())}
    assert sorted(data.asked) == sorted(problem.id for some in SETS.values() for problem in some)
    assert data.synced == ranks


def on_rank(folder: Path) -> tuple[dict[str, float], str | None]:
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scores = concluded(rank, count, folder / "two")
    (folder / "file").touch()
    try:
        concluded(rank, count, folder / "file")
    except RolloutError as error:
        return scores.metrics(), str(error)
    return scores.metrics(), None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return concluded(0, 1, folder), folder


@pytest.mark.slow
def test_two_ranks_conclude_what_one_does(alone: tuple[Scores, Path], tmp_path: Path) -> None:
    """The same numbers on each, to the last bit, and the same files; a disk that cannot be written to stops all."""
    scores, folder = alone
    for metrics, failure in on_ranks(2, on_rank, tmp_path):
        assert metrics == scores.metrics()
        assert failure is not None
        assert "cannot be kept in" in failure
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 2 * len(SETS)
    assert [(tmp_path / "two" / file).read_bytes() for file in files] == [(folder / file).read_bytes() for file in files]


def test_the_kept_answers_are_all_there_is_and_give_the_scores(alone: tuple[Scores, Path]) -> None:
    scores, folder = alone
    tables = {name: pq.read_table(folder / name / "step=7.parquet").to_pylist() for name in SETS}
    assert {name: len(rows) for name, rows in tables.items()} == {"odd": 28, "one": 4, "even": 16}
    assert [(row["number"], row["sample"]) for row in tables["odd"]] == [(i, j) for i in range(7) for j in range(4)]
    first = tables["odd"][0]
    assert (first["set"], first["id"], first["step"], first["answer"]) == ("odd", "a0", 7, "0")
    assert first["prompt"] == [{"role": "user", "content": "0?"}]
    assert score(tables, 4) == scores
    assert json.loads((folder / "odd" / "step=7.json").read_text())["estimates"]["avg@4"] == vars(
        scores.sets["odd"].estimates["avg@4"]
    )


def test_scores_are_the_estimators_of_the_table(alone: tuple[Scores, Path]) -> None:
    scores, folder = alone
    correct, drawn = {}, {}
    for name in SETS:
        rows = pq.read_table(folder / name / "step=7.parquet").to_pylist()
        correct[name] = np.array([row["outcome"] == "correct" for row in rows]).reshape(-1, 4)
        found = scores.sets[name]
        assert found.problems == len(SETS[name])
        assert list(found.estimates) == ["avg@4", "pass@2", "pass@4", "maj@4"]
        assert found.estimates["avg@4"].value == pytest.approx(avg_at(correct[name]).mean(), abs=1e-12)
        assert found.estimates["pass@2"].value == pytest.approx(pass_at(correct[name], 2).mean(), abs=1e-12)
        assert found.unparseable_share == sum(row["outcome"] == "unparseable" for row in rows) / len(rows)
        assert found.truncated_share == sum(not row["finished"] for row in rows) / len(rows)
        drawn[name] = resampled_means(avg_at(correct[name]), seed=11)
        ends = (found.estimates["avg@4"].low, found.estimates["avg@4"].high)
        assert ends == pytest.approx(interval(drawn[name]), abs=0.03), "another seed, other resamples"
    mean = scores.mean.estimates["avg@4"]
    assert mean.value == pytest.approx(np.mean([avg_at(table).mean() for table in correct.values()]), abs=1e-12)
    assert (mean.low, mean.high) == pytest.approx(interval(drawn["odd"] / 3 + drawn["even"] / 3 + drawn["one"] / 3), abs=0.03)
    width = mean.high - mean.low
    assert 0 < width < max(e.high - e.low for e in (found.estimates["avg@4"] for found in scores.sets.values()))


def rows_of(*answers: tuple[str | None, str]) -> list[dict[str, Any]]:
    return [{"extracted": extracted, "outcome": outcome, "finished": True} for extracted, outcome in answers]


def test_numbers_vote_by_value_and_formulas_by_their_text() -> None:
    half = rows_of(("0.5", "correct"), (r"\frac12", "correct"), ("7", "wrong"), ("8", "wrong"), ("9", "wrong"))
    assert score({"a": half}, 5).sets["a"].estimates["maj@5"].value == 1
    points = rows_of(
        ("(1, 2)", "wrong"), ("(1,2)", "wrong"), ("3", "correct"), ("unclear" * 99, "unparseable"), (None, "timed_out")
    )
    assert score({"a": points}, 5).sets["a"].estimates["maj@5"].value == 0
    assert score({"a": points}, 5).sets["a"].unparseable_share == 1 / 5


def test_several_numbers_are_no_vote_for_the_last() -> None:
    rows = rows_of(("x=3", "correct"), ("x=1 or x=3", "wrong"), ("x=2, x=3", "wrong"), ("4", "wrong"), ("4", "wrong"))
    assert score({"a": rows}, 5).sets["a"].estimates["maj@5"].value == 0


def test_a_verifier_that_does_not_say_what_it_read_has_no_majority() -> None:
    silent = rows_of((None, "correct"), (None, "wrong"))
    assert list(score({"a": silent}, 2).sets["a"].estimates) == ["avg@2", "pass@2"]
    hopeless = rows_of((None, "unparseable"), (None, "unparseable"))
    assert score({"a": hopeless}, 2).sets["a"].estimates["maj@2"].value == 0
    assert list(score({"a": silent, "b": hopeless}, 2).mean.estimates) == ["avg@2", "pass@2"]


def test_text_that_is_no_utf_8_is_kept(tmp_path: Path) -> None:
    rows = next(iter(stream(0, 1))).rows()[:4]
    turns = [{"role": "user", "content": "\ud800?"}]
    conclude([{**row, "response": "\ud800!", "prompt": turns} for row in rows], 4, 0, tmp_path)
    kept = pq.read_table(tmp_path / "odd" / "step=0.parquet").to_pylist()[0]
    assert (kept["response"], kept["prompt"][0]["content"]) == ("?!", "??")


def test_an_evaluation_without_answers_says_so(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="sampled nothing"):
        conclude([], 1, 0, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither is given"),
        ({"prompts": SET, "datasets": {"a": SET}}, "both are given; set one of them, and the other to null"),
        ({"datasets": {}}, "at least one set"),
        ({"datasets": {"a/b": SET}}, "without '/'"),
        ({"prompts": SET, "samples": 0}, r"data\.evaluation\.samples must be at least 1, got 0"),
        ({"prompts": SET, "batch_prompts": 0}, r"data\.evaluation\.batch_prompts must be at least 1, got 0"),
        ({"prompts": SET, "samples": 2, "sampling": Sampling(temperature=0)}, "samples must be 1 at temperature 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Evaluation(**settings)


def test_the_curves_are_the_numbers() -> None:
    from cppo_lightning.figures.validation import Curve, validation_curves

    two = Curve("a avg@8", (0, 10), (0.1, 0.4), (0.05, 0.3), (0.2, 0.5))
    figure = validation_curves([two, Curve("b avg@8", (10,), (0.3,), (0.2,), (0.4,))])
    (axes,) = figure.axes
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert lines == {"a avg@8": [[0, 0.1], [10, 0.4]], "b avg@8": [[10, 0.3]]}
    band, bar = (np.concatenate([path.vertices for path in drawn.get_paths()]) for drawn in axes.collections)
    assert {(0, 0.05), (0, 0.2), (10, 0.3), (10, 0.5)} <= set(map(tuple, band.tolist()))
    assert set(map(tuple, bar.tolist())) == {(10, 0.2), (10, 0.4)}


@pytest.fixture(scope="module")
def trained(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One rollout with an evaluation of two sets at its end: the logger's folder, and a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    callback = EvalAccuracy(TWO_SETS, samples=4, max_tokens=8, at_start=False, batch_problems=2)
    data = make_data(tiny_model_path, seed=3)
    trainer = make_trainer(folder, [callback], 1, logger=TensorBoardLogger(folder, name="", version="run"))
    trainer.fit(make_module(tiny_model_path), datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    data.close()
    return folder, folder / "last.ckpt"


def test_validate_on_a_checkpoint_finds_what_training_did(
    trained: tuple[Path, Path],
    tiny_model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Answer by answer: the same weights, step, seeds and loop."""
    folder, checkpoint = trained
    sampling = Sampling(max_tokens=8, temperature=0.7, top_p=0.95)
    data = make_data(
        tiny_model_path, seed=3, evaluation=Evaluation(samples=4, sampling=sampling, batch_prompts=2, datasets=TWO_SETS)
    )
    trainer = make_trainer(tmp_path, [report := EvaluationReport()], logger=TensorBoardLogger(tmp_path, name="", version="run"))
    trainer.validate(make_module(tiny_model_path), datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    data.close()
    for name in TWO_SETS:
        there, here = (pq.read_table(at / "run" / "evaluations" / name / "step=2.parquet") for at in (folder, tmp_path))
        assert there.num_rows == 4 * len(TWO_SETS[name].load())
        assert here.equals(there)
    before, after = scalars(folder), scalars(tmp_path)
    tags = [tag for tag in before if tag.startswith("eval/") and tag != "eval/seconds"]
    assert len(tags) == 2 * (4 * 3 + 2) + 3 * 3
    assert {tag: after[tag] for tag in tags} == {tag: before[tag] for tag in tags}
    assert report.scores is not None
    printed = capsys.readouterr().out
    assert "Evaluation at step 2, 4 samples per problem" in printed
    estimate = report.scores.sets["first"].estimates["avg@4"]
    (line,) = (line.split() for line in printed.splitlines() if line.startswith(" first "))
    assert line[:5] == ["first", "3", f"{estimate.value:.3f}", f"[{estimate.low:.3f},", f"{estimate.high:.3f}]"]
    assert f"answers: {tmp_path / 'run' / 'evaluations'}/*/step=2.parquet" in printed
    assert after["val/accuracy"][0][1] == pytest.approx(
        (3 * estimate.value + 2 * report.scores.sets["second"].estimates["avg@4"].value) / 5
    )


def test_the_report_prints_names_as_they_are(alone: tuple[Scores, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """rich knows 100 between colons as an emoji."""
    report = EvaluationReport()
    report.scores = replace(alone[0], sets={"a:100:b": alone[0].sets["odd"]})
    report.on_validation_end(make_trainer(alone[1], []), Module())
    assert "\n a:100:b " in f"\n{capsys.readouterr().out}"


class SignalAt(Callback):
    """Sends SIGTERM after so many optimizer steps, in an evaluation if there is one, else in the next step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluation_progress(self, trainer: Any, dataset: str, done: int, total: int) -> None:
        if (trainer.global_step, dataset) == (self.step, "second"):
            send()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            send()


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        *(({"every_n_rollouts": 2}, step) for step in (2, 4, 5, 6)),
        ({"every_n_rollouts": 1, "at_end": False}, 6),
    ],
    ids=["inside a rollout", "between two", "in the last update", "after the last rollout", "which is one of every n"],
)
def test_an_evaluation_that_a_signal_cut_off_is_made_by_the_run_that_goes_on(
    settings: dict[str, Any], step: int, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rollouts of two updates, the last two drawn ahead: as in a run that was left alone, with each evaluation once."""

    def train(*others: Callback, resume: Path | None = None) -> tuple[list[Any], list[torch.Tensor]]:
        callback = EvalAccuracy(TWO_SETS, samples=2, max_tokens=8, batch_problems=2, **settings)
        module = make_module(tiny_model_path)
        fit(tmp_path, module, make_data(tiny_model_path, plan=plan(1)), 3, [callback, *others], resume)
        for _, metrics in callback.history:
            del metrics["eval/seconds"]
        return callback.history, weights(module)

    history, last = train()
    assert [at for at, _ in history] == ([0, 4, 6] if settings["every_n_rollouts"] == 2 else [0, 2, 4, 6])
    with INTERRUPTS.handled(), pytest.raises(SystemExit):
        train(SignalAt(step), FailureCheckpoint(str(tmp_path)), Shutdown())
    capsys.readouterr()
    again, found = train(RunSummary(), resume=tmp_path / "after_failure.ckpt")
    assert again == history
    assert same(found, last)
    assert "at step 0  ->" in capsys.readouterr().out.split("at step 6")[0], "the table has the evaluation that was made up for"


def test_the_table_has_a_column_for_each_score(alone: tuple[Scores, Path]) -> None:
    table = score_table(alone[0], 7)
    titles = ["set", "problems", "avg@4", "pass@2", "pass@4", "maj@4", "truncated", "unparseable"]
    assert [column.header for column in table.columns] == titles
    assert list(table.columns[0].cells) == ["odd", "one", "even", "mean"]
    assert list(table.columns[1].cells) == ["7", "1", "4", "12"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_keeps_its_numbers_in_a_narrow_terminal(alone: tuple[Scores, Path], width: int) -> None:
    """With as many columns as 16 samples give."""
    scores = alone[0]
    sets = {
        name: replace(found, estimates={key: found.estimates["avg@4"] for key in NAMES_OF_16})
        for name, found in scores.sets.items()
    }
    table = score_table(replace(scores, samples=16, sets=sets, mean=replace(sets["odd"], problems=12)), 7)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    words = set(printed.split())
    for found in sets.values():
        value, low, high = (f"{end:.3f}" for end in astuple(found.estimates["avg@16"]))
        assert {value, f"[{low},", f"{high}]"} <= words
    assert {*NAMES_OF_16, "problems"} <= words
