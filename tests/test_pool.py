"""The pool really stops what it is asked to stop, loses nothing, and leaves no process behind."""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, Verdict, VerifierPool

# A user's own verifier, in a module of their own: what the response says is what happens.
MOODY = """
import os, subprocess, sys, time
from cppo_lightning.verifiers import Outcome, Verdict, Verifier

class Moody(Verifier):
    def __call__(self, problem, response):
        what, _, rest = response.partition(" ")
        if what == "sleep":
            time.sleep(3600)
        elif what == "power":
            9 ** 9 ** 9 ** 9
        elif what == "exit":
            os._exit(3)
        elif what == "exit_once" and not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(3)
        elif what == "allocate":
            bytearray(10 << 30)
        elif what == "raise":
            raise KeyError("no such thing")
        elif what == "child":
            with open(rest, "w") as file:
                file.write(str(subprocess.Popen(["sleep", "3600"]).pid))
            time.sleep(3600)
        elif what == "nan":
            return Verdict(Outcome.CORRECT, float("nan"))
        elif what == "none":
            return None
        elif what == "noise":
            print("noise", flush=True)
            sys.stdin.read()
        elif what == "modules":
            return Verdict(Outcome.CORRECT, 1.0, " ".join(sys.modules))
        return Verdict(Outcome.CORRECT, 0.5, response)

    def check(self, problem):
        if problem.answer == "sleep":
            time.sleep(3600)
        if not problem.answer:
            raise ValueError("no answer at all")

def fail():
    raise ImportError("needs a library that is not here")

class Unloadable(Moody):
    def __reduce__(self):
        return fail, ()

class DiesAtStart(Moody):
    def __reduce__(self):
        return os._exit, (7,)
"""
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "5")


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    (tmp_path / "moody_verifier.py").write_text(MOODY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import moody_verifier  # pyright: ignore[reportMissingImports]

    yield moody_verifier
    del sys.modules["moody_verifier"]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent to notice does not."""
    try:
        os.kill(pid, 0)
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc/self").exists() else True
        )
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all processes have ended within a generous time."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_outcomes_are_told_apart_and_order_is_kept(moody, capfd: pytest.CaptureFixture[str]) -> None:
    responses = ["a", "sleep", "b", "exit", "raise", "c", "allocate", "nan", "none", "d", "noise", "power", "e"]
    with VerifierPool(moody.Moody(), workers=2, deadline=1.5) as pool:
        verdicts = pool.judge([(PROBLEM, response) for response in responses])
    by = dict(zip(responses, verdicts, strict=True))
    for good in ("a", "b", "c", "d", "e", "noise"):
        assert by[good] == Verdict(Outcome.CORRECT, 0.5, good)
    for late in ("sleep", "power"):
        assert by[late] == Verdict(Outcome.TIMED_OUT, 0.0, detail="killed after 1.5 s")
    details = {"exit": "exit status 3", "raise": "KeyError", "allocate": "MemoryError", "nan": "reward nan", "none": "NoneType"}
    for failed, detail in details.items():
        assert by[failed].outcome is Outcome.FAILED
        assert by[failed].reward == 0.0
        assert detail in by[failed].detail, by[failed]
    assert "noise" in capfd.readouterr().err


def test_one_death_is_forgiven(moody, tmp_path: Path) -> None:
    """A worker that is killed from outside (out of memory, say) does not cost its item the verdict."""
    with VerifierPool(moody.Moody(), workers=1) as pool:
        response = f"exit_once {tmp_path / 'flag'}"
        assert pool.judge([(PROBLEM, response)]) == [Verdict(Outcome.CORRECT, 0.5, response)]
        killed = pool.pids
        os.kill(killed[0], signal.SIGKILL)
        assert [v.extracted for v in pool.judge([(PROBLEM, "a"), (PROBLEM, "b")])] == ["a", "b"]
        assert pool.pids != killed


def test_what_a_verifier_started_dies_with_it(moody, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(moody.Moody(), workers=1, deadline=1.0) as pool:
        assert pool.judge([(PROBLEM, f"child {note}")])[0].outcome is Outcome.TIMED_OUT
        assert gone([int(note.read_text())], 5)


def test_a_worker_has_no_torch() -> None:
    """Neither at its start nor after both verifiers of this project have run."""
    code = (
        "import sys; sys.argv = ['x']; import cppo_lightning.verifiers.worker; from cppo_lightning.verifiers import *\n"
        "MathAnswer().prepare()\nprint('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_worker_of_a_torch_process_has_no_torch(moody) -> None:
    assert "torch" in sys.modules
    with VerifierPool(moody.Moody(), workers=1) as pool:
        loaded = (pool.judge([(PROBLEM, "modules")])[0].extracted or "").split()
    assert "moody_verifier" in loaded
    assert not {"torch", "lightning", "transformers"} & set(loaded)


def test_pathological_answers_neither_stop_nor_grow_the_parent() -> None:
    """Random mixture with good answers: every good one is still right, every hostile one gets some verdict but CORRECT."""
    hostile = [
        *(
            "9^{9^{9^{9}}}",
            "99999999!",
            r"(\pi+1)^{99999}",
            r"\sqrt{2}^{\sqrt{3}^{99999999}}",
            r"\operatorname{zeros}(99999,99999)",
        ),
        *(
            "{" * 1_000_000 + "}" * 1_000_000,
            "1" * 1_000_000,
            r"\frac{" * 150 + "}" * 150,
            "{" * 450 + "}" * 450,
            "\0",
            "\ud800",
        ),
        *(r"\sum_{k=1}^{10^{99}} k", r"\int_0^{\infty} e^{x^{x^x}} dx", "__import__('os')._exit(0)", "Answer: " * 100_000),
    ]
    root_two = Problem("q", (), r"\sqrt{2}")
    pairs = [(root_two, f"\\boxed{{{text}}}") for text in hostile]
    pairs += [(PROBLEM, r"\boxed{5}")] * 100 + [(root_two, r"\boxed{\sqrt 2}")] * 20
    random.Random(0).shuffle(pairs)
    with VerifierPool(MathAnswer(), workers=2, deadline=1.0, memory_mb=1024) as pool:
        pool.judge(pairs[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        verdicts = pool.judge(pairs)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    good = {r"\boxed{5}", r"\boxed{\sqrt 2}"}
    assert [v.outcome is Outcome.CORRECT for v in verdicts] == [response in good for _, response in pairs]
    assert sum(v.outcome is Outcome.TIMED_OUT for v in verdicts) >= 1
    assert grown < 50 << (10 if sys.platform == "linux" else 20)


def test_large_responses_do_not_block(moody) -> None:
    """More than a pipe holds, while the worker is busy or dying."""
    responses = ["x" * 3_000_000, "sleep " + "y" * 3_000_000, "exit " + "z" * 3_000_000, "w" * 3_000_000]
    with VerifierPool(moody.Moody(), workers=1, deadline=1.0) as pool:
        outcomes = [v.outcome for v in pool.judge([(PROBLEM, r) for r in responses])]
    assert outcomes == [Outcome.CORRECT, Outcome.TIMED_OUT, Outcome.FAILED, Outcome.CORRECT]


def test_close_leaves_no_process_and_the_pool_starts_again() -> None:
    pool = VerifierPool(MathAnswer(), workers=2)
    assert pool.pids == []
    assert pool.judge([]) == []
    assert pool.judge([(PROBLEM, r"\boxed{5}")] * 4) == [Verdict(Outcome.CORRECT, 1.0, "5")] * 4
    first = pool.pids
    assert len(first) == 2
    pool.close()
    pool.close()
    assert gone(first, 5)
    assert pool.judge([(PROBLEM, r"\boxed{6}")])[0].outcome is Outcome.WRONG
    second = pool.pids
    del pool
    assert gone(second, 5)


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from moody_verifier import Moody
from cppo_lightning.verifiers import Problem, VerifierPool
problem = Problem("p", (), "5")
pool = VerifierPool(Moody(), workers=2, deadline=2.0 if sys.argv[2] == "power" else 600.0)
pool.judge([(problem, "a")] * 64)
print(*pool.pids, flush=True)
if sys.argv[2] == "end":
    sys.exit(0)
pool.judge([(problem, sys.argv[2])] * 4)
"""


@pytest.mark.parametrize(
    ("how", "doing"), [("SIGKILL", "sleep"), ("SIGINT", "sleep"), ("SIGTERM", "sleep"), ("SIGKILL", "power"), ("", "end")]
)
def test_no_orphans(moody, tmp_path: Path, how: str, doing: str) -> None:
    """However the parent ends, and whatever its workers are doing then, a stuck interpreter included."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), doing], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    if how:
        assert any(map(alive, pids))
        time.sleep(0.3)  # let the workers begin
        parent.send_signal(getattr(signal, how))
    parent.wait(20)
    parent.stdout.close()
    assert gone(pids, 20)


def test_a_fork_does_not_disturb_its_parent(moody) -> None:
    with VerifierPool(moody.Moody(), workers=1) as pool:
        pool.judge([(PROBLEM, "a")])
        before = pool.pids
        child = os.fork()
        if child == 0:
            right = [v.extracted for v in pool.judge([(PROBLEM, "in the child")])] == ["in the child"]
            pool.close()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [v.extracted for v in pool.judge([(PROBLEM, "b")])] == ["b"]
        assert pool.pids == before


def test_check_runs_in_the_workers(moody) -> None:
    answers = ["5", "", "sleep", "6"]
    with VerifierPool(moody.Moody(), deadline=1.0) as pool:
        verdicts = pool.check([Problem(answer, (), answer) for answer in answers])
    assert [v.outcome.value for v in verdicts] == ["correct", "failed", "timed_out", "correct"]
    assert verdicts[1].detail == "ValueError: no answer at all"


def test_verifiers_that_cannot_be_sent(moody, tmp_path: Path) -> None:
    class Local(MathAnswer):
        pass

    with pytest.raises(ConfigError, match=r"Local cannot be pickled.*top of a module"):
        VerifierPool(Local())
    with VerifierPool(moody.Unloadable()) as pool, pytest.raises(ConfigError, match="needs a library that is not here"):
        pool.judge([(PROBLEM, "a")])
    with VerifierPool(moody.DiesAtStart(), workers=1) as pool, pytest.raises(RolloutError, match="exit status 7"):
        pool.judge([(PROBLEM, "a")])
    script = tmp_path / "script.py"
    script.write_text(MOODY + "\nfrom cppo_lightning.verifiers import VerifierPool\nVerifierPool(Moody())\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert "ConfigError: the verifier Moody is defined in the script or notebook that is running" in done.stderr


def test_a_problem_that_cannot_be_sent_fails_alone(moody) -> None:
    odd = Problem("odd", (), "5", metadata={"function": lambda: 0})
    with VerifierPool(moody.Moody()) as pool:
        verdicts = pool.judge([(odd, "a"), (PROBLEM, "b")])
        assert pool.judge([(odd, "a")])[0].outcome is Outcome.FAILED
    assert [v.outcome for v in verdicts] == [Outcome.FAILED, Outcome.CORRECT]
    assert "cannot be sent" in verdicts[0].detail


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"deadline": 0.0}, "deadline must be a positive number of seconds, got 0"),
        ({"deadline": float("nan")}, "deadline must be a positive"),
        ({"memory_mb": 16}, "memory_mb must be at least 256"),
        ({"verifier": "math"}, "must be a cppo_lightning.verifiers.Verifier, got str"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VerifierPool(**{"verifier": MathAnswer(), **setting})


def test_an_unstarted_pool_is_picklable() -> None:
    with pickle.loads(pickle.dumps(VerifierPool(MathAnswer(), workers=1))) as pool:
        assert pool.judge([(PROBLEM, r"\boxed{5}")])[0].outcome is Outcome.CORRECT
