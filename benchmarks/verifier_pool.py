"""How fast a verifier pool judges, how soon it replaces a worker, and what kills and hostile answers do to it.

    python benchmarks/verifier_pool.py
    python benchmarks/verifier_pool.py --data ../shared/data/math_train.jsonl --storm 0 --hostile 0

Formulas come from a file of JSON lines with an ``answer`` (numbers among them are left out), or from a list below.  No pair of
gold answer and response is judged twice, and no answer is spelled the same way in two responses, so that nothing is remembered.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the hostile answers and the storm are those of the tests

from cppo_lightning.verifiers import Format, MathAnswer, Outcome, Problem, VerifierPool
from cppo_lightning.verifiers.normalise import read_number
from tests.hostile import Pair, hostile_pairs, kill_storm, mixed, right_and_wrong

# N stands for a number.
FORMULAS = (
    *(
        r"\frac{N}{7}\pi",
        r"N\sqrt{3}",
        r"\frac{N\sqrt{5}}{2}",
        r"\frac{1+\sqrt{N}}{2}",
        r"N-2\sqrt{6}",
        r"\sqrt[3]{N}",
        r"N\pi",
    ),
    *(r"N\pi", r"N+2i", r"\frac{\pi}{N}", r"x^{2}+Nx+1", r"(x-N)(x+2)", r"\left(N,\frac{\pi}{2}\right)", r"(N,-1)"),
    *(r"(-\infty,N)", r"[N,\infty)", r"(-1,2)\cup(3,N)", r"\{1,2,N\}", r"y=2x+N", r"x\ge N", r"N^{\circ}"),
    *(
        r"\begin{pmatrix}1\\N\end{pmatrix}",
        r"\frac{N}{x+1}",
        r"\frac{x+2}{N}",
        r"2^{N}",
        r"e^{N}",
        r"\ln N",
        r"\log_{2}N",
        r"\sin\frac{\pi}{N}",
        r"\frac{N!}{3}",
    ),
    *(r"\cos N^{\circ}", r"3\cdot 2^{N}", r"\frac{1}{N^{2}}", r"N\sqrt{2}+\sqrt{3}", r"-\frac{N}{9}\sqrt{11}", r"a^{N}b^{2}"),
    *(r"N\text{ or }5", r"6\pm\sqrt{N}", r"\frac{N}{3}", r"|x-N|", r"\frac{3}{N}e^{x}"),
)
SPELLINGS = ((r"\frac", r"\dfrac"), (r"\sqrt{", r"\sqrt {"), ("+", " + "), ("-", " - "), ("(", r"\left("), (")", r"\right)"))
TARGETS = {"integers": 3000, "formulas": 300}  # verdicts per second that the project sets itself, on two cores


def formulas(file: Path | None, number: int) -> list[str]:
    """Gold answers that are no numbers."""
    if file is None:
        return [text.replace("N", str(3 + i)) for i in range(-(-number // len(FORMULAS))) for text in FORMULAS][:number]
    answers = dict.fromkeys(json.loads(line)["answer"] for line in file.read_text().splitlines() if line.strip())
    return [answer for answer in answers if read_number(answer) is None][:number]


def formula_pairs(golds: list[str]) -> list[Pair]:
    """For each gold answer itself, spelled differently, and the next one's, spelled in yet another way."""
    pairs = []
    for i, gold in enumerate(golds):
        right, wrong = gold, golds[(i + 1) % len(golds)]
        if r"\left" not in gold + wrong:
            for plain, other in SPELLINGS:
                right = right.replace(plain, other)
        pairs.append((Problem(f"right-{i}", (), gold), f"\\boxed{{{right}}}"))
        pairs.append((Problem(f"wrong-{i}", (), gold), f"\\boxed{{\\,{wrong}\\,}}"))
    return pairs


def integer_pairs(number: int) -> list[Pair]:
    """Right and off by one, at the end of a response of 2,000 characters."""
    thoughts = "Let us think about this. " * 80
    return [(Problem(f"{i}", (), str(i)), f"{thoughts}\nAnswer: {i + i % 2}") for i in range(number)]


def rate(pool: VerifierPool, pairs: list[Pair]) -> tuple[float, str]:
    """Verdicts per second, and what they were."""
    began = time.perf_counter()
    verdicts = pool.judge(pairs)
    seconds = time.perf_counter() - began
    return len(pairs) / seconds, shares(Counter(verdict.outcome for verdict in verdicts))


def shares(outcomes: Counter[Outcome]) -> str:
    return ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common())


def respawn_ms(pool: VerifierPool, rounds: int) -> tuple[float, float]:
    """Median milliseconds from a kill to the next verdict, and of a verdict without one, with a verifier that does nothing."""
    after_kill, plain = [], []
    for _ in range(rounds):
        for times, kill in ((plain, False), (after_kill, True)):
            began = time.perf_counter()
            if kill:
                os.kill(pool.pids[0], signal.SIGKILL)
            pool.judge([(Problem("p", (), ""), "x")])
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(after_kill), statistics.median(plain)


def storm(pool: VerifierPool, seconds: float) -> str:
    judged, wrong = 0, 0
    with kill_storm(pool) as killed:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pairs, expected = right_and_wrong(judged, 200)
            wrong += sum(v.outcome is not e for v, e in zip(pool.judge(pairs), expected, strict=True))
            judged += len(pairs)
    return f"{len(killed)} workers killed in {seconds:g} s, {judged:,} verdicts, {wrong} of them changed or lost"


def hostile(number: int, deadline: float) -> Iterator[str]:
    """The time of each answer by itself, then all mixed with as many good ones."""
    with VerifierPool(MathAnswer(), workers=1, deadline=deadline) as pool:
        pool.judge(hostile_pairs(1))
        times = []
        for pair in hostile_pairs(number):
            began = time.perf_counter()
            pool.judge([pair])
            times.append(time.perf_counter() - began)
    yield f"longest {max(times):.2f} s, median {1e3 * statistics.median(times):.1f} ms (deadline {deadline:g} s)"
    with VerifierPool(MathAnswer(), deadline=deadline) as pool:
        pool.judge(hostile_pairs(1))
        pairs, good = mixed(number, number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        verdicts = pool.judge(pairs)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << (10 if sys.platform == "linux" else 20))
    yield shares(Counter(v.outcome for v in verdicts))
    right = sum((v.outcome is Outcome.CORRECT) == g for v, g in zip(verdicts, good, strict=True))
    yield f"{right:,} of {len(pairs):,} rightly correct or not; this process grew by {grown:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON lines with an answer each; left out: a list of this script's own")
    parser.add_argument("--integers", type=int, default=30_000, help="integer verdicts")
    parser.add_argument("--formulas", type=int, default=1000, help="gold answers, for two verdicts each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storm", type=float, default=20.0, help="seconds; 0 leaves it out")
    parser.add_argument("--hostile", type=int, default=500, help="hostile answers; 0 leaves them out")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds per hostile answer")
    arguments = parser.parse_args()
    processor = platform.processor() or platform.machine()
    table = Table("measured", "figure", "remark", title=f"{arguments.workers} workers, {os.cpu_count()} cores, {processor}")
    with VerifierPool(Format("x"), workers=arguments.workers) as pool:
        pool.judge([(Problem("p", (), ""), "x")] * 8)
        per_second, _ = rate(pool, [(pair[0], "x" * 2000) for pair in integer_pairs(arguments.integers)])
        table.add_row("the pool itself", f"{1e6 / per_second:.0f} us per verdict", "a verifier that does nothing")
        killed, plain = respawn_ms(pool, 50)
        table.add_row("a verdict after a kill", f"{killed:.1f} ms", f"without: {plain:.1f} ms; Format's supervisor is small")
    with VerifierPool(MathAnswer(), workers=arguments.workers) as pool:
        began = time.perf_counter()
        pool.judge(integer_pairs(8))
        table.add_row("first verdict", f"{time.perf_counter() - began:.2f} s", "imports of math-verify and SymPy")
        work = {"integers": integer_pairs(arguments.integers)}
        work["formulas"] = formula_pairs(formulas(arguments.data, arguments.formulas))
        for name, pairs in work.items():
            random.Random(0).shuffle(pairs)
            per_second, outcomes = rate(pool, pairs)
            table.add_row(name, f"{per_second:,.0f}/s", f"{outcomes}; the aim is {TARGETS[name]:,}/s")
        killed, plain = respawn_ms(pool, 50)
        table.add_row("a verdict after a kill", f"{killed:.1f} ms", f"without: {plain:.1f} ms; with SymPy loaded")
        if arguments.storm:
            table.add_row("storm of kills", "one per 50 ms", storm(pool, arguments.storm))
    if arguments.hostile:
        for line in hostile(arguments.hostile, arguments.deadline):
            table.add_row(f"{arguments.hostile} hostile answers", "", line)
    Console().print(table)


if __name__ == "__main__":
    main()
