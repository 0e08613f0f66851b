"""The command that kills a run: what it changes of the settings, what it finds, and that it does."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from cppo_lightning.cli import main
from cppo_lightning.resume_traces import Comparison, compare
from tests.test_architecture import REPOSITORY
from tests.test_readme import RESUME_CHECK

DEBUG = str(REPOSITORY / "configs" / "debug.yaml")


def a_run(folder: Path, loss: float = 0.5, problems: str = "ab", weight: int = 3) -> None:
    """What a run leaves: two processes' metrics, in the second of which a step is repeated, and lines, one of them torn."""
    folder.mkdir()
    for values in ([0.1, loss + 1], [0.1, loss]):
        logger = TensorBoardLogger(folder, name="", version="logs", default_hp_metric=False)
        for step, value in enumerate(values):
            logger.log_metrics({"train/loss": value, "rollout/seconds_sampling": value * loss}, step=step)
        logger.finalize("success")
    update = {"event": "update", "rollout": 0, "update": 0, "time": 0.0}
    lines = [{**update, "problems": ["x"], "responses": "0"}, {**update, "problems": list(problems), "responses": "1"}]
    (folder / "0.jsonl").write_text("\n".join([json.dumps(lines[0]), '{"event": "upd', json.dumps(lines[1])]))
    (folder / "weights.json").write_text(json.dumps({"head": weight, "embedding": 1}))


@pytest.mark.parametrize(
    ("difference", "what", "first"),
    [
        ({}, "", ""),
        ({"weight": 4}, "weights", "head: 4, left alone 3"),
        ({"loss": 0.75}, "metrics by step", "1, train/loss: 0.75, left alone 0.5"),
        ({"problems": "ac"}, "problems by update", "rank 0, rollout, 0, 0: ['a', 'c'], left alone ['a', 'b']"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, difference: dict[str, Any], what: str, first: str) -> None:
    """Times are left out, and what a killed run did twice counts as it did it the last time."""
    a_run(tmp_path / "whole")
    a_run(tmp_path / "killed", **difference)
    found = compare(tmp_path / "whole", tmp_path / "killed")
    assert [row.total for row in found] == [2, 2, 1, 1]
    assert {row.what: row.first for row in found if row.first} == ({what: first} if what else {})
    assert all((row.equal < row.total) == bool(row.first) for row in found)


def test_what_only_one_run_has_is_a_difference() -> None:
    nan = float("nan")
    assert Comparison.of("metrics", {"a": nan, "b": 1.0}, {"a": nan}) == Comparison(
        "metrics", 1, 2, "b: missing, left alone 1.0"
    )
    assert Comparison.of("metrics", {}, {"c": 0}).first == "c: 0, left alone missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills=0"], "--kills must be at least 1, got 0"),
        (["--folder=."], "--folder '.' is not empty"),
    ],
)
def test_settings_that_cannot_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        main(["resume-check", "--config", DEBUG, *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run of configs/debug.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README's own command, with a rollout drawn ahead; the debug config has no checkpoints of its own."""
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(RESUME_CHECK)[3:], "--data.plan.max_staleness=1", "--folder=runs"])
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    assert "kill 2 of 2" in out
    assert "25 of 25" in out
    assert "none" in out
    saved = yaml.safe_load((folder / "runs" / "killed" / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][-2]["init_args"]["every_n_train_steps"] == 1
    events = [json.loads(line)["event"] for line in (folder / "runs" / "killed" / "0.jsonl").read_text().splitlines()]
    assert events.count("began") == 3
    assert events[-1] == "ended"
    assert len(list((folder / "runs" / "killed" / "logs").glob("events*"))) == 3
    assert not (folder / "runs" / "debug").exists(), "the config's own logger"


@pytest.mark.vllm
@pytest.mark.soak
def test_vllm_twelve_kills_lose_and_repeat_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The debug config with vLLM in process, killed in the middle of updates and of rollouts."""
    engine = ["--data.engine=cppo_lightning.rollout.VLLMEngine", "--data.engine.max_model_len=256"]
    # slow enough that rewards go on varying, since a rollout of equal ones is not trained on
    longer = ["--trainer.max_epochs=8", "--model.optimizer.init_args.lr=1e-4"]
    with pytest.raises(SystemExit):  # as rounding decides, which may depend on what vLLM samples at once
        main(["resume-check", "--config", DEBUG, *engine, *longer, "--kills=12", "--folder=runs"])
    out = capsys.readouterr().out
    assert "kill 12 of 12" in out
    found = {row.what: row for row in compare(folder / "runs" / "left_alone", folder / "runs" / "killed")}
    assert found["problems by update"].first == ""
    assert found["problems by update"].total == 16
    responses = found["responses by update"]
    assert responses.total == 16
    assert responses.equal > 8, "little but rounding may differ"
