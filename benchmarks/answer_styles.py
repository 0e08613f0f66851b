"""Does MathAnswer accept every gold answer however it is written, and nothing else, and how fast?

    python benchmarks/answer_styles.py
    python benchmarks/answer_styles.py --data FOLDER --perturbed 20000 --seed 0 --workers 2

FOLDER holds JSON lines, each with ``id``, ``problem`` and ``answer``, or in the layout of DAPO-Math-17k; without ``--data``
it is ``../shared/data`` beside this repository.  Four tables: gold answers by style, with the ids of those not accepted;
perturbed answers, each checked by a small evaluator of its own to have another value, and those accepted; how often
math-verify says the same of both kinds; and verdicts per second through the pool, for pairs of gold answer and answer that are
all distinct.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from wrong_answers import perturbed

from cppo_lightning.verifiers import MathAnswer, Outcome, Problem, Verdict, VerifierPool
from cppo_lightning.verifiers.normalise import read_number
from cppo_lightning.verifiers.structure import split

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PLAIN = re.compile(r"(-?)([0-9]+)(\.[0-9]+)?")
CHUNK = 2000  # pairs per call of the pool


class Pair(NamedTuple):
    problem: Problem
    response: str


def load(folder: Path) -> dict[str, list[Problem]]:
    """Problems by file."""
    sets: dict[str, list[Problem]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, file.open(encoding="utf-8")):
            if "reward_model" in row:
                turns, answer, name = row["prompt"], row["reward_model"]["ground_truth"], row["extra_info"]["index"]
            else:
                turns, answer, name = [{"role": "user", "content": row["problem"]}], row["answer"], row["id"]
            sets.setdefault(file.stem, []).append(Problem(str(name), tuple(turns), answer, dataset=file.stem))
    return sets


# --- styles ---------------------------------------------------------------------------------------------------------------


def with_zeros(gold: str) -> str | None:
    found = PLAIN.fullmatch(gold)
    return None if found is None else f"\\boxed{{{found[1]}00{found[2]}{found[3] or ''}}}"


def with_thousands(gold: str) -> str | None:
    found = PLAIN.fullmatch(gold)
    return None if found is None or len(found[2]) < 4 else f"Answer: {found[1]}{int(found[2]):,}{found[3] or ''}"


def with_unit(gold: str) -> str | None:
    """For one quantity that has no unit yet."""
    one = split(gold) is None and not re.search(r"\\text|\\mbox|\\mathrm|circ|%|[<>=_]|\\l?g?eq?\b|\\pm", gold)
    return f"\\boxed{{{gold.rstrip('.')}\\text{{ units}}}}" if one else None


STYLES: dict[str, Callable[[str], str | None]] = {
    "boxed": lambda gold: f"so it is $\\boxed{{{gold}}}$.",
    "Answer:": lambda gold: f"Answer: {gold}",
    "bold": lambda gold: f"**Answer: {gold}**",
    "dollars": lambda gold: f"Answer: ${gold}$",
    "period": lambda gold: f"Answer: {gold}.",
    "\\( \\)": lambda gold: f"The final answer is: \\({gold}\\)",
    "display": lambda gold: f"\\[\n\\boxed{{{gold}}}.\n\\]",
    "thinking": lambda gold: f"<think>\\boxed{{0}}?</think>\n\nAnswer:\n{gold}",
    "dfrac": lambda gold: f"\\boxed{{{respell(gold)}}}" if respell(gold) != gold else None,
    "zeros": with_zeros,
    "1,000": with_thousands,
    "units": with_unit,
}


def respell(gold: str) -> str:
    return re.sub(r"\\[dt]?frac(?![A-Za-z])", r"\\dfrac", gold).replace(" ", "  ").replace("^{\\circ}", "^\\circ")


# --- what is run ----------------------------------------------------------------------------------------------------------


def judged(pool: VerifierPool, pairs: list[Pair], progress: Progress, label: str) -> Iterator[tuple[Pair, Verdict]]:
    bar = progress.add_task(label, total=len(pairs))
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        yield from zip(chunk, pool.judge(chunk), strict=True)
        progress.advance(bar, len(chunk))


def style_table(sets: Mapping[str, list[Problem]], pool: VerifierPool, progress: Progress) -> tuple[Table, list[str]]:
    table = Table("data set", *STYLES, title="Gold answers accepted, by the style they are written in", box=SIMPLE)
    failed: list[str] = []
    for name, problems in sets.items():
        cells = []
        for style, write in STYLES.items():
            pairs = [Pair(p, text) for p in problems if (text := write(p.answer)) is not None]
            right = 0
            for pair, verdict in judged(pool, pairs, progress, f"{name}, {style}"):
                right += verdict.outcome is Outcome.CORRECT
                if verdict.outcome is not Outcome.CORRECT:
                    failed.append(f"{pair.problem.id} ({style}, {verdict.outcome}): {pair.problem.answer}")
            cells.append(f"{right}/{len(pairs)}" if pairs else "")
        table.add_row(name, *cells)
    return table, failed


def perturbation_table(kinds: Mapping[str, list[Pair]], pool: VerifierPool, progress: Progress) -> tuple[Table, list[str]]:
    table = Table("perturbed", "to numbers", "to formulas", "accepted", title="Wrong answers", box=SIMPLE)
    accepted: list[str] = []
    for kind, pairs in kinds.items():
        before = len(accepted)
        for pair, verdict in judged(pool, pairs, progress, kind):
            if verdict.outcome is not Outcome.WRONG:
                accepted.append(f"{pair.problem.id} ({kind}, {verdict.outcome}): {pair.problem.answer}   {pair.response}")
        numbers = sum(read_number(pair.problem.answer) is not None for pair in pairs)
        table.add_row(kind, str(numbers), str(len(pairs) - numbers), str(len(accepted) - before))
    return table, accepted


def math_verify_says(gold: str, answer: str) -> bool:
    """math-verify's own verdict on a pair, each in a box, with its own limit of 5 s."""
    import math_verify

    return math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(f"\\boxed{{{answer}}}"))


def comparison(right: list[Pair], wrong: list[Pair], pool: VerifierPool, progress: Progress) -> tuple[Table, list[str]]:
    table = Table(
        "formulas", "pairs", "same verdict", "only MathAnswer", "only math-verify", title="Against math-verify", box=SIMPLE
    )
    notes: list[str] = []
    for name, pairs in {"gold answers, respelled": right, "wrong answers": wrong}.items():
        counts: dict[tuple[bool, bool], int] = defaultdict(int)
        for pair, verdict in judged(pool, pairs, progress, f"math-verify, {name}"):
            gold, answer = pair.problem.answer, pair.response.removeprefix("\\boxed{").removesuffix("}")
            both = verdict.outcome is Outcome.CORRECT, math_verify_says(gold, answer)
            counts[both] += 1
            if both[0] != both[1]:
                notes.append(f"{'MathAnswer' if both[0] else 'math-verify'} accepts {answer}   for {gold}")
        same = counts[True, True] + counts[False, False]
        table.add_row(name, str(len(pairs)), str(same), str(counts[True, False]), str(counts[False, True]))
    return table, notes


def speed(pairs: list[Pair], pool: VerifierPool) -> float:
    """Verdicts per second, the pool's workers being there."""
    started = time.perf_counter()
    pool.judge(pairs)
    return len(pairs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gold answers in many styles, wrong answers, and verdicts per second.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of .jsonl files")
    parser.add_argument("--perturbed", type=int, default=20_000, help="wrong answers in all")
    parser.add_argument("--compare", type=int, default=500, help="pairs of each kind that math-verify judges as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    sets = load(options.data) if options.data.is_dir() else {}
    if not sets:
        parser.error(f"no .jsonl files in {options.data}; give a folder of them with --data: each line has id, problem, answer")
    problems = [problem for group in sets.values() for problem in group]
    made = perturbed(problems, options.perturbed, options.seed)
    kinds = {kind: [Pair(p, f"\\boxed{{{answer}}}") for p, answer in pairs] for kind, pairs in made.items()}
    wrong = [pair for pairs in kinds.values() for pair in pairs if read_number(pair.problem.answer) is None]
    golds = {p.answer: p for p in problems if read_number(p.answer) is None}
    right = [Pair(p, f"\\boxed{{{respell(gold)}}}") for gold, p in golds.items()]
    rng = random.Random(options.seed)
    numbers = [pair for pairs in kinds.values() for pair in pairs if read_number(pair.problem.answer) is not None]
    console = Console()
    console.width = max(console.width, 160)  # a table's cells are not to be cut short in a file
    with VerifierPool(MathAnswer(), workers=options.workers) as pool:
        pool.judge(right[: 4 * options.workers])  # the workers start
        mixed = rng.sample(wrong, min(len(wrong), 2 * len(right))) + right
        rng.shuffle(mixed)
        rates = {"numbers": (len(numbers), speed(numbers, pool)), "formulas": (len(mixed), speed(mixed, pool))}
        with Progress(console=console, transient=True) as progress:
            tables = [style_table(sets, pool, progress), perturbation_table(kinds, pool, progress)]
            few = [rng.sample(pairs, min(len(pairs), options.compare)) for pairs in (right, wrong)]
            tables.append(comparison(few[0], few[1], pool, progress))
    for table, notes in tables:
        console.print(table)
        console.print("\n".join(notes) or "none", markup=False, highlight=False)
    for name, (count, rate) in rates.items():
        console.print(f"{name}: {rate:.0f} verdicts per second, {count} distinct pairs, {options.workers} workers")
    console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
