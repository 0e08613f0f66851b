"""The pool really stops what it is asked to stop, loses nothing, and leaves no process behind."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cppo_lightning.errors import ConfigError, RolloutError
from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, Verdict, VerifierPool
from cppo_lightning.verifiers.protocol import decode_verdict, encode_verdict

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
MOODY = (Path(__file__).parent / "moody.py").read_text()
SECONDS = 60.0  # only a defect takes as long
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "5")


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A user's own verifier, in a module of their own."""
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


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pids: list[int]) -> bool:
    """Whether all processes have ended within a generous time."""
    end = time.monotonic() + SECONDS
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
    details = {"exit": "exit status 3", "raise": "KeyError", "allocate": "limit of 2048 MiB reached"}
    details |= {"nan": "reward nan", "none": "str instead of a Verdict"}
    for failed, detail in details.items():
        assert by[failed].outcome is Outcome.FAILED
        assert by[failed].reward == 0.0
        assert detail in by[failed].detail, by[failed]
    assert "noise" in capfd.readouterr().err


def test_one_death_is_forgiven(moody, tmp_path: Path) -> None:
    """A worker that ends by something that is not there a second time does not cost its item the verdict."""
    with VerifierPool(moody.Moody(), workers=1) as pool:
        response = f"exit_once {tmp_path / 'flag'}"
        assert pool.judge([(PROBLEM, response)]) == [Verdict(Outcome.CORRECT, 0.5, response)]
        killed = pool.pids
        os.kill(killed[0], signal.SIGKILL)
        assert [v.extracted for v in pool.judge([(PROBLEM, "a"), (PROBLEM, "b")])] == ["a", "b"]
        assert pool.pids != killed


def test_an_item_outlives_seven_workers_that_others_kill(moody, tmp_path: Path) -> None:
    """The kernel out of memory, say; an item that is always at it when that happens is given up."""
    unlucky, hopeless = f"killed 7 {tmp_path / 'seven'}", f"killed 8 {tmp_path / 'eight'}"
    with VerifierPool(moody.Moody(), workers=1) as pool:
        verdicts = pool.judge([(PROBLEM, response) for response in ("a", unlucky, "b", hopeless, "c")])
    assert [v.extracted for v in verdicts] == ["a", unlucky, "b", None, "c"]
    assert verdicts[3] == Verdict(Outcome.FAILED, 0.0, detail="the worker died (signal SIGKILL), 8 times")


def test_no_verdict_comes_from_a_failed_allocation(moody) -> None:
    """Whatever the verifier or a library makes of it; and of what others have left in memory no item fails."""
    with VerifierPool(moody.Moody(), workers=1, memory_mb=512) as pool:
        swallowed = ["swallow wrong", "swallow wrong bare", "swallow wrong many", "swallow unparseable bare"]
        failed = Verdict(Outcome.FAILED, 0.0, detail="memory limit of 512 MiB reached")
        assert pool.judge([(PROBLEM, response) for response in swallowed]) == [failed] * 4
        proven = "swallow correct bare"
        assert pool.judge([(PROBLEM, proven)])[0].outcome is Outcome.CORRECT
        hoarding = ["hoard 200"] * 6
        assert [v.outcome for v in pool.judge([(PROBLEM, response) for response in hoarding])] == [Outcome.CORRECT] * 6


def test_parts_of_a_reward_come_back(moody) -> None:
    with VerifierPool(moody.Moody(), workers=1) as pool:
        assert pool.judge([(PROBLEM, "parts")]) == [Verdict(Outcome.WRONG, 0.25, parts={"math": 0.0, "format": 0.25})]
    full = Verdict(Outcome.WRONG, 0.1, "\ud800 \0 é", "why", {f"part {i}": i / 3 for i in range(32)})
    assert decode_verdict(json.loads(encode_verdict(full))) == full
    for parts in ({"a": math.inf}, {"a": "b"}, {str(i): 0.0 for i in range(33)}, {"a" * 201: 0.0}, [0.5]):
        with pytest.raises(ValueError, match=r"reward|parts|float"):
            encode_verdict(Verdict(Outcome.WRONG, 0.0, parts=parts))  # pyright: ignore[reportArgumentType]
        with pytest.raises((ValueError, TypeError)):
            decode_verdict(json.loads(encode_verdict(full)) | {"parts": parts})


def test_what_a_verifier_started_dies_with_it(moody, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(moody.Moody(), workers=1, deadline=1.0) as pool:
        while not (note.exists() and note.read_text()):  # a busy machine may take a second to start it
            assert pool.judge([(PROBLEM, f"child {note}")])[0].outcome is Outcome.TIMED_OUT
        assert gone([int(note.read_text())])


def test_a_worker_has_no_torch() -> None:
    """Neither at its start nor after both verifiers of this project have run."""
    code = (
        "import sys; sys.argv = ['x']; import cppo_lightning.verifiers.supervisor; from cppo_lightning.verifiers import *\n"
        "MathAnswer().prepare()\nprint('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_workers_get_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "aws_secret_access_key", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "kept-or-not")
    with VerifierPool(MathAnswer(), workers=1) as pool:
        pool.judge([(Problem("p", (), "1"), "\\boxed{1}")])
        environment = Path(f"/proc/{pool.pids[0]}/environ").read_bytes()
    names = [entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry.endswith(b"=kept-or-not")]
    assert names == [b"TOKENIZERS_PARALLELISM"]


def test_a_worker_of_a_torch_process_has_no_torch(moody) -> None:
    assert "torch" in sys.modules
    with VerifierPool(moody.Moody(), workers=1) as pool:
        loaded = (pool.judge([(PROBLEM, "modules")])[0].extracted or "").split()
    assert "moody_verifier" in loaded
    assert not {"torch", "lightning", "transformers"} & set(loaded)


def test_large_responses_do_not_block(moody) -> None:
    """More than a pipe holds, while the worker is busy or dying."""
    responses = ["x" * 3_000_000, "sleep " + "y" * 3_000_000, "exit " + "z" * 3_000_000, "w" * 3_000_000]
    with VerifierPool(moody.Moody(), workers=1, deadline=1.0) as pool:
        outcomes = [v.outcome for v in pool.judge([(PROBLEM, r) for r in responses])]
    assert outcomes == [Outcome.CORRECT, Outcome.TIMED_OUT, Outcome.FAILED, Outcome.CORRECT]


def test_close_leaves_no_process_and_the_pool_starts_again(moody) -> None:
    pool = VerifierPool(moody.Moody(), workers=2)
    assert pool.pids == []
    assert pool.judge([]) == []
    assert pool.judge([(PROBLEM, "a")] * 4) == [Verdict(Outcome.CORRECT, 0.5, "a")] * 4
    first = pool.pids
    assert len(first) == 2
    pool.close()
    pool.close()
    assert gone(first)
    assert pool.judge([(PROBLEM, "b")])[0].extracted == "b"
    second = pool.pids
    del pool
    assert gone(second)


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from moody_verifier import Moody
from cppo_lightning.verifiers import Problem, VerifierPool
problem = Problem("p", (), "5")
pool = VerifierPool(Moody(), workers=2, deadline=600.0)
pool.judge([(problem, "a")] * 64)
print(*pool.pids, flush=True)
if sys.argv[2] == "end":
    sys.exit(0)
if sys.argv[2] == "crash":
    waiting = [pool.submit(problem, "sleep") for _ in range(4)]
    raise SystemError("the trainer is broken")
pool.judge([(problem, sys.argv[2])] * 4)
"""


@linux
@pytest.mark.parametrize(
    ("how", "doing"),
    [("SIGKILL", "sleep"), ("SIGINT", "sleep"), ("SIGTERM", "sleep"), ("SIGKILL", "power"), ("", "crash"), ("", "end")],
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
        pids.append(parent_of(pids[0]))
        assert all(map(alive, pids))
        time.sleep(0.3)  # let the workers begin
        parent.send_signal(getattr(signal, how))
    parent.wait(SECONDS)
    parent.stdout.close()
    assert gone(pids)


@linux
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_no_orphan_while_loading(moody, tmp_path: Path, how: str) -> None:
    script, note = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT.replace("Moody", "LoadsForever"))
    command = [sys.executable, str(script), str(tmp_path), "a"]
    parent = subprocess.Popen(command, env=os.environ | {"MOODY_NOTE": str(note)}, stderr=subprocess.DEVNULL)
    while not (note.exists() and note.read_text()):
        time.sleep(0.05)
    parent.send_signal(getattr(signal, how))
    parent.wait(SECONDS)
    assert gone([int(note.read_text())])


@linux
def test_another_supervisor_goes_on_with_the_work(moody, tmp_path: Path) -> None:
    with VerifierPool(moody.Moody(), workers=2, deadline=600) as pool:
        pool.judge([(PROBLEM, "a")] * 8)
        before, supervisor = pool.pids, parent_of(pool.pids[0])
        flag = tmp_path / "flag"
        futures = [pool.submit(PROBLEM, response) for response in (f"wait {flag}", *map(str, range(200)), f"wait {flag}")]
        os.kill(supervisor, signal.SIGKILL)
        assert gone(before)
        flag.touch()
        assert [future.result().extracted for future in futures] == [f"wait {flag}", *map(str, range(200)), f"wait {flag}"]
        assert parent_of(pool.pids[0]) != supervisor


@linux
def test_a_supervisor_that_is_stuck_is_replaced(moody, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cppo_lightning.verifiers.dispatcher._SILENCE", 0.5)
    monkeypatch.setattr("cppo_lightning.verifiers.process._END_SECONDS", 0.5)
    with VerifierPool(moody.Moody(), workers=1, deadline=0.5) as pool:
        pool.judge([(PROBLEM, "a")])
        before, supervisor = pool.pids, parent_of(pool.pids[0])
        os.kill(supervisor, signal.SIGSTOP)
        assert [v.extracted for v in pool.judge([(PROBLEM, "b"), (PROBLEM, "c")])] == ["b", "c"]
        assert gone([*before, supervisor])


@linux
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signals_to_a_whole_job_are_for_the_trainer(moody, tmp_path: Path, number: str) -> None:
    with VerifierPool(moody.Moody(), workers=1) as pool:
        pool.judge([(PROBLEM, "a")])
        before = pool.pids
        for pid in (*before, parent_of(before[0])):
            os.kill(pid, getattr(signal, number))
        assert [v.extracted for v in pool.judge([(PROBLEM, "b")])] == ["b"]
        assert pool.pids == before


def test_a_fork_does_not_disturb_its_parent(moody) -> None:
    """Work under way stays the parent's, and the child has processes of its own."""
    with VerifierPool(moody.Moody(), workers=1) as pool:
        pool.judge([(PROBLEM, "a")])
        before = pool.pids
        futures = [pool.submit(PROBLEM, str(number)) for number in range(500)]
        child = os.fork()
        if child == 0:
            right = pool.pids == []
            right &= [v.extracted for v in pool.judge([(PROBLEM, "in the child")])] == ["in the child"]
            pool.close()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [future.result(SECONDS).extracted for future in futures] == [str(number) for number in range(500)]
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
    for name, wrong, message in [
        ("DiesAtStart", RolloutError, "loading the verifier DiesAtStart: exit status 7"),
        ("CannotBeForked", RolloutError, "before they have judged anything.*exit status 9"),
        ("StartsThreads", ConfigError, r"has started threads \(helper\)"),
        ("Large", ConfigError, r"take [4-9]\d\d MiB.*memory_mb = 400 to at least"),
    ]:
        with VerifierPool(getattr(moody, name)(), workers=2, memory_mb=400) as pool:
            for _ in range(2):
                with pytest.raises(wrong, match=message):
                    pool.judge([(PROBLEM, "a")] * 3)
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
        ({"max_pending": 0}, "max_pending must be at least 1, got 0"),
        ({"verifier": "math"}, "must be a cppo_lightning.verifiers.Verifier, got str"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VerifierPool(**{"verifier": MathAnswer(), **setting})


def test_a_pool_is_pickled_without_its_processes(moody) -> None:
    with VerifierPool(moody.Moody(), workers=1, deadline=9.0, memory_mb=1024, max_pending=7) as pool:
        pool.judge([(PROBLEM, "a")])
        copy = pickle.loads(pickle.dumps(pool))
    assert (copy.pids, copy.workers, copy.deadline, copy.memory_mb, copy.max_pending) == ([], 1, 9.0, 1024, 7)
    with copy as pool:
        assert pool.judge([(PROBLEM, "b")])[0].extracted == "b"
