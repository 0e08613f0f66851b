"""A verifier to which the response says what is to happen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from cppo_lightning.verifiers import Outcome, Problem, Verdict, Verifier

HOARD: list[bytearray] = []


class Moody(Verifier):
    def __call__(self, problem: Problem, response: str) -> Verdict:
        what, _, rest = response.partition(" ")
        act = getattr(self, f"on_{what}", None)
        verdict = None if act is None else act(rest)
        return verdict or Verdict(Outcome.CORRECT, 0.5, response)

    def check(self, problem: Problem) -> None:
        if problem.answer == "sleep":
            time.sleep(3600)
        if problem.answer.startswith("sleep_once "):
            self.on_sleep_once(problem.answer.partition(" ")[2])
        if not problem.answer:
            raise ValueError("no answer at all")

    def on_sleep(self, rest: str) -> None:
        time.sleep(3600)

    def on_sleep_once(self, flag: str) -> None:
        if not Path(flag).exists():
            Path(flag).touch()
            time.sleep(3600)

    def on_power(self, rest: str) -> None:
        bytes(9**9**9**9)

    def on_exit(self, rest: str) -> None:
        os._exit(3)

    def on_exit_once(self, flag: str) -> None:
        if not Path(flag).exists():
            Path(flag).touch()
            os._exit(3)

    def on_killed(self, rest: str) -> None:
        """As by someone else, so many times; the file counts."""
        times, _, file = rest.partition(" ")
        with open(file, "a") as count:
            count.write("x")
        if Path(file).stat().st_size <= int(times):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_allocate(self, rest: str) -> None:
        bytearray(10 << 30)

    def on_swallow(self, verdict: str) -> Verdict:
        """What libraries do: whatever went wrong, the answers are not equal."""
        try:
            _ = [bytearray(1 << 16) for _ in range(1 << 40)] if "many" in verdict else bytearray(10 << 30)
        except:  # noqa: E722
            if "bare" not in verdict and not isinstance(sys.exc_info()[1], Exception):
                raise
        return Verdict(Outcome(verdict.split()[0]), 0.0)

    def on_hoard(self, megabytes: str) -> None:
        HOARD.append(bytearray(int(megabytes) << 20))

    def on_raise(self, rest: str) -> None:
        raise KeyError("no such thing")

    def on_child(self, note: str) -> None:
        Path(note).write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
        time.sleep(3600)

    def on_nan(self, rest: str) -> Verdict:
        return Verdict(Outcome.CORRECT, float("nan"))

    def on_none(self, rest: str) -> Verdict:
        return "none"  # pyright: ignore[reportReturnType]

    def on_parts(self, rest: str) -> Verdict:
        return Verdict(Outcome.WRONG, 0.25, parts={"math": 0.0, "format": 0.25})

    def on_noise(self, rest: str) -> None:
        print("noise", flush=True)
        sys.stdin.read()

    def on_modules(self, rest: str) -> Verdict:
        return Verdict(Outcome.CORRECT, 1.0, " ".join(sys.modules))

    def on_wait(self, flag: str) -> None:
        while not Path(flag).exists():
            time.sleep(0.01)


def fail() -> None:
    raise ImportError("needs a library that is not here")


class Unloadable(Moody):
    def __reduce__(self):
        return fail, ()


class DiesAtStart(Moody):
    def __reduce__(self):
        return os._exit, (7,)


class StartsThreads(Moody):
    def prepare(self) -> None:
        threading.Thread(target=time.sleep, args=(3600,), name="helper", daemon=True).start()


class Large(Moody):
    def prepare(self) -> None:
        self.on_hoard("400")


class CannotBeForked(Moody):
    def prepare(self) -> None:
        os.register_at_fork(after_in_child=lambda: os._exit(9))


class LoadsForever(Moody):
    def prepare(self) -> None:
        Path(os.environ["MOODY_NOTE"]).write_text(str(os.getpid()))
        time.sleep(3600)
