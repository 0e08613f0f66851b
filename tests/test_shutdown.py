"""However a run ends in the middle of a rollout, it says so in one line and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from cppo_lightning.cli import main

DEBUG = str(Path(__file__).parents[1] / "configs" / "debug.yaml")

# A verifier that never answers and an engine that ends in some way; both say when they are at it.
SLOWLY = """
import time
from pathlib import Path
from cppo_lightning.errors import RolloutError
from cppo_lightning.rollout import TransformersEngine
from cppo_lightning.verifiers import Verifier

class Slow(Verifier):
    def __call__(self, problem, response):
        Path("began").touch()
        time.sleep(3600)

class Ending(TransformersEngine):
    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def generate(self, *arguments, **more):
        if self.how == "sleep":
            Path("began").touch()
            time.sleep(3600)
        raise {"RolloutError": RolloutError, "RuntimeError": RuntimeError, "Ctrl-C": KeyboardInterrupt}[self.how]("as asked")
"""
SLOW_VERIFIER = ["--data.verifier=slowly.Slow"]


def ending(how: str) -> list[str]:
    return ["--data.engine=slowly.Ending", f"--data.engine.init_args.how={how}"]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    (tmp_path / "slowly.py").write_text(SLOWLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def running(mark: str) -> dict[int, str]:
    """Every process that has ``mark`` in its environment, whoever its parent is: its id and command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def ended(mark: str, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while running(mark) and time.monotonic() < limit:
        time.sleep(0.1)
    return not running(mark)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("sign", "arguments", "code"),
    [
        ("SIGINT", SLOW_VERIFIER, 130),
        ("SIGTERM", ending("sleep"), 143),
        ("SIGKILL", SLOW_VERIFIER, -signal.SIGKILL),
    ],
    ids=["Ctrl-C while judging", "SIGTERM while sampling", "SIGKILL while judging"],
)
def test_a_signal_in_the_middle_of_a_rollout(sign: str, arguments: list[str], code: int, folder: Path) -> None:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "cppo_lightning", "fit", "--config", DEBUG, *arguments]
    run = subprocess.Popen(
        command, env=os.environ | {"MARK": mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        limit = time.monotonic() + 300
        while not (folder / "began").exists() and run.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        assert len(running(mark)) > 1, "the pool's processes are not seen, so their end would not be either"
        run.send_signal(getattr(signal, sign))
        output = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert run.returncode == code
    assert ended(mark, 60), running(mark)
    if code > 0:
        assert output.rstrip().endswith(f"stopped: interrupted by {sign}")
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [("RolloutError", 1, "stopped: as asked"), ("Ctrl-C", 130, "stopped: interrupted by SIGINT"), ("RuntimeError", None, "")],
)
def test_an_error_in_the_middle_of_a_rollout(
    how: str, code: int | None, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in this process: the pool is closed, and signals do what they did before."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK", mark)  # read by the pool's processes alone: /proc shows this one's first environment
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises((SystemExit, RuntimeError)) as end:
        main(["fit", "--config", DEBUG, *ending(how)])
    assert ended(mark, 60), running(mark)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    if code is None:
        assert str(end.value) == "as asked"  # a traceback: nobody has foreseen it
    else:
        assert isinstance(end.value, SystemExit)
        assert end.value.code == code
        assert capsys.readouterr().err.rstrip().endswith(message)


def test_sigterm_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("cppo_lightning.cli._run", terminated)
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 143
    assert capsys.readouterr().err == "stopped: interrupted by SIGTERM\n"
