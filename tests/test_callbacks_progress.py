"""The progress line: what it says, that it fits, and that it gives the terminal back."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cppo_lightning.callbacks import EvalAccuracy, MaskRate, RolloutMetrics, RolloutProgress
from cppo_lightning.callbacks.progress_display import ProgressDisplay
from cppo_lightning.callbacks.progress_line import ProgressLine, clock
from cppo_lightning.resume import settle_loops
from tests.callback_rig import UPDATES, Data, Module, trainer
from tests.test_callbacks import OUTCOMES, Counted

LINE = ProgressLine(
    done=6,
    total=22,
    within=0.5,
    phase="update 2/2",
    numbers={"a": "reward 0.531", "b": "mask 1.2%", "c": "512 tok/s", "d": "eval 0.850"},
    elapsed=60,
    left=3723,
)


def draw(width: int, line: ProgressLine = LINE) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(line, end="")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", range(4, 160, 3))
def test_the_line_is_one_line_of_any_terminal(width: int) -> None:
    drawn = draw(width)
    assert drawn.count("\n") == 1
    assert len(drawn.rstrip("\n")) <= width


def test_a_narrow_terminal_loses_the_bar_first_and_then_the_least_important_numbers() -> None:
    assert re.search(
        r"rollout  7/22  ━{8,30}  update 2/2 .* reward 0.531  mask 1.2%  512 tok/s  eval 0.850  1:02:03 left", draw(140)
    )
    middle = draw(70)
    assert "━" not in middle
    assert "reward 0.531" in middle
    assert "eval" not in middle
    assert "1:02:03 left" in middle


@pytest.mark.parametrize(("done", "total", "text"), [(0, 3, "rollout 1/3"), (3, 3, "rollout 3/3"), (4, None, "rollout 5")])
def test_the_count_includes_the_running_rollout(done: int, total: int | None, text: str) -> None:
    assert ProgressLine(done=done, total=total).count == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (7.9, "0:07"), (754, "12:34"), (11045, "3:04:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def callbacks() -> list[Any]:
    evaluation = EvalAccuracy({"sums": Counted(1, 2)}, every_n_rollouts=2, samples=2)
    return [RolloutMetrics(), MaskRate(), evaluation, RolloutProgress()]


def test_a_log_file_gets_one_line_per_rollout_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, callbacks(), rollouts=3).fit(Module(), datamodule=Data(OUTCOMES))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("rollout", "evaluation"))]
    assert [line.split(" | ")[0] for line in lines] == [
        "evaluation at step 0",
        "rollout 1/3",
        f"evaluation at step {2 * UPDATES}",
        "rollout 2/3",
        f"evaluation at step {3 * UPDATES}",
        "rollout 3/3",
    ]
    assert f" | step {UPDATES} | " in lines[1]
    assert "reward 0.625 | mask 42.9% | 10 tok/s | eval 0.750" in lines[1]
    assert re.search(r"\d:\d\d left$", lines[1])
    assert re.search(r"\d:\d\d elapsed$", lines[-1])


@pytest.mark.parametrize(("verb", "word"), [("validate", "validating"), ("test", "testing"), ("predict", "predicting")])
def test_other_commands_have_a_simple_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, word: str) -> None:
    run = trainer(tmp_path, [RolloutProgress()], limit_val_batches=1.0)
    getattr(run, verb)(Module(), datamodule=Data(OUTCOMES))
    assert re.search(rf"^batch {UPDATES}/{UPDATES} \| {word}: done \| 0:00 elapsed$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("silent_seconds", "lines"), [(1e-9, UPDATES), (60.0, 1)])
def test_a_log_file_is_not_left_without_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], silent_seconds: float, lines: int
) -> None:
    """After so many seconds the next batch writes one."""
    run = trainer(tmp_path, [RolloutProgress(silent_seconds=silent_seconds)], limit_val_batches=1.0)
    run.validate(Module(), datamodule=Data(OUTCOMES))
    assert len(re.findall(rf"^batch \d/{UPDATES} \| validating", capsys.readouterr().out, re.MULTILINE)) == lines
    run = trainer(tmp_path, [*callbacks()[:-1], RolloutProgress(silent_seconds=silent_seconds)], rollouts=1)
    run.fit(Module(), datamodule=Data(OUTCOMES))
    said = capsys.readouterr().out
    assert ("rollout 1/1 | update 1/" in said) == ("eval sums 0/" in said) == (lines > 1)


class Idle(Module):
    """Takes no step in the first ``rollouts``."""

    def __init__(self, rollouts: int) -> None:
        super().__init__()
        self.rollouts = rollouts

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers() if self.current_epoch >= self.rollouts else SimpleNamespace(step=lambda: None)


def counts(printed: str) -> list[str]:
    return re.findall(r"^rollout +(\d+/\d+) \|", printed, re.MULTILINE)


def test_max_steps_are_further_away_after_steps_that_were_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, [RolloutProgress()], rollouts=-1, max_steps=2 * UPDATES).fit(Idle(3), datamodule=Data(OUTCOMES))
    assert counts(capsys.readouterr().out) == ["1/2", "2/3", "3/4", "4/5", "5/5"]


def test_a_run_that_goes_on_inside_a_rollout_knows_how_many_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module()
    monkeypatch.setattr(module, "on_save_checkpoint", settle_loops)  # what this package's own module does
    run = trainer(tmp_path, [], rollouts=-1, max_steps=1)
    run.fit(module, datamodule=Data(OUTCOMES))
    run.save_checkpoint(tmp_path / "inside.ckpt")
    again = trainer(tmp_path, [RolloutProgress()], rollouts=-1, max_steps=UPDATES + 1)
    again.fit(Module(), datamodule=Data(OUTCOMES), ckpt_path=tmp_path / "inside.ckpt", weights_only=True)
    assert counts(capsys.readouterr().out) == ["1/2", "2/2"]


def test_text_that_is_printed_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich knows 100 between colons as an emoji, and a word in brackets as markup."""
    ProgressDisplay(lambda: LINE, refresh_per_second=0.01).print("data.jsonl:100: no [b]answer")
    assert capsys.readouterr().out == "data.jsonl:100: no [b]answer\n"


def test_a_disabled_bar_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RolloutProgress()
    bar.disable()
    trainer(tmp_path, [bar]).fit(Module(), datamodule=Data(OUTCOMES))
    assert "rollout 1/2" not in capsys.readouterr().out


class Terminal:
    """A pseudo-terminal in place of stdout; ``text`` is what it was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.master, slave = os.openpty()
        self.file = os.fdopen(slave, "w")
        self.chunks: list[bytes] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        monkeypatch.setattr(sys, "stdout", self.file)
        monkeypatch.setattr(sys, "stderr", self.file)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "120")

    def _read(self) -> None:
        try:
            while chunk := os.read(self.master, 4096):
                self.chunks.append(chunk)
        except OSError:  # how Linux ends a pseudo-terminal
            return

    def text(self) -> str:
        self.file.close()
        self.reader.join()
        os.close(self.master)
        return b"".join(self.chunks).decode()


def test_a_terminal_gets_a_moving_line_and_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    trainer(tmp_path, callbacks()).fit(Module(), datamodule=Data(OUTCOMES))
    assert sys.stdout is terminal.file
    text = terminal.text()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0, "the cursor is shown again as often as it was hidden"
    assert "rollout 2/2" in text
    assert "evaluation at step" not in text, "no log lines beside the moving one"


def test_log_messages_appear_above_the_line_and_handlers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    logger, handler = logging.getLogger("rig"), logging.StreamHandler(terminal.file)
    logger.addHandler(handler)
    display = ProgressDisplay(lambda: LINE, refresh_per_second=0.01)
    assert display.moves
    logger.warning("a message")
    display.stop()
    logger.removeHandler(handler)
    assert handler.stream is terminal.file
    before, after = terminal.text().split("a message")
    assert before.endswith("\x1b[2K"), "the line was erased before the message"
    assert "rollout  7/22" in after


def test_an_interrupted_run_gives_the_terminal_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    module = Module()
    monkeypatch.setattr(module, "training_step", lambda batch, batch_idx: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [RolloutProgress()]).fit(module, datamodule=Data(OUTCOMES))
    assert sys.stdout is terminal.file
    assert terminal.text().count("\x1b[?25h") == 1
