"""The quickstart's task with TRL's GRPOTrainer and with this project: rollouts per minute and final accuracy.

    python benchmarks/vs_trl.py --trl-python ENVIRONMENT/bin/python

TRL needs an environment of its own.  Model, prompts and their order, samples, longest responses, updates, learning rate,
threads and float32 are the same; each side runs alone, one after the other.  Accuracy is avg@8 on held-out sums, by this
project's ``validate`` for both.

All keep memory that was freed, as ``MALLOC`` tells glibc.  By itself glibc gives large blocks back and takes them again: two
thirds of TRL's page faults were that, and what they cost (a tenth to a half of its CPU time) is the machine's doing, not TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from cppo_lightning.prompts.prompt_order import PromptOrder
from cppo_lightning.rollout import PromptTemplate, ReasoningGymPrompts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

COMMAND = (sys.executable, "-m", "cppo_lightning")
OURS = {"embedded engine": "configs/quickstart.yaml", "vLLM": "configs/quickstart_vllm.yaml"}
# no block by mmap, and none given back; see mallopt(3)
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
THREADS = {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Outcome:
    """What a side came to."""

    seconds: list[float]  # of each rollout
    kernel: float  # share of the CPU time
    accuracy: float


class Clock(Callback):
    """Writes the seconds of each rollout, sampling and updates, to a file.

    Args:
        file: JSON, when training ends.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = Path(file)
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once before the first rollout."""
        self.times.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update."""
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once after training."""
        self.file.write_text(json.dumps([b - a for a, b in zip(self.times, self.times[1:], strict=False)]))


def run(*command: str) -> str:
    """What a command prints; its errors go to ours."""
    environment = os.environ | MALLOC | THREADS
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def trained(*command: str) -> tuple[str, float]:
    """What a command prints, and the kernel's share of its CPU time."""
    before = os.times()
    printed = run(*command)
    after = os.times()
    user, kernel = after.children_user - before.children_user, after.children_system - before.children_system
    return printed, kernel / (user + kernel)


def ours(config: str, rollouts: int, folder: Path) -> Outcome:
    """Of the shipped config, its callbacks left out."""
    saves = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_epochs": rollouts}
    checkpoints = {"class_path": "cppo_lightning.callbacks.RunCheckpoint", "init_args": saves}
    clock = {"class_path": "benchmarks.vs_trl.Clock", "init_args": {"file": str(folder / "seconds.json")}}
    more = {"trainer": {"callbacks": [clock, checkpoints], "enable_checkpointing": True, "max_epochs": rollouts}}
    (folder / "more.yaml").write_text(yaml.safe_dump(more))
    logger = f"--trainer.logger.init_args.save_dir={folder}"
    _, kernel = trained(*COMMAND, "fit", "--config", config, "--config", str(folder / "more.yaml"), logger)
    (resolved,) = folder.glob("*/*/config.yaml")
    run(*COMMAND, "export", "--config", str(resolved), str(folder / "last.ckpt"), str(folder / "model"))
    return Outcome(json.loads((folder / "seconds.json").read_text()), kernel, accuracy(folder))


def trl(python: str, rollouts: int, folder: Path) -> Outcome:
    """Of TRL."""
    config = yaml.safe_load(Path(OURS["embedded engine"]).read_text())
    data, plan = config["data"], config["data"]["plan"]
    problems = ReasoningGymPrompts(**data["prompts"]["init_args"]).load()
    template = PromptTemplate(**data["template"])
    taken = PromptOrder(problems, config["seed_everything"]).take(rollouts * plan["prompts"])
    settings: dict[str, Any] = {
        **plan,
        "model": config["model"]["policy"]["path"],
        "lr": config["model"]["optimizer"]["init_args"]["lr"],
        "max_tokens": data["sampling"]["max_tokens"],
        "rollouts": rollouts,
        "problems": [{"messages": template.messages(problem), "answer": problem.answer} for problem in taken],
        "output": str(folder / "model"),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    printed, kernel = trained(python, str(Path(__file__).with_name("trl_side.py")), str(folder / "settings.json"))
    return Outcome(json.loads(printed.splitlines()[-1]), kernel, accuracy(folder))


def accuracy(folder: Path) -> float:
    """avg@8 on held-out sums of the model saved in ``folder / "model"``."""
    own = ["--model.policy.path", str(folder / "model"), f"--trainer.logger.init_args.save_dir={folder}"]
    run(*COMMAND, "validate", "--config", OURS["embedded engine"], *own)
    (found,) = folder.glob("*/*/evaluations/evaluation/*.json")
    return json.loads(found.read_text())["estimates"]["avg@8"]["value"]


def main() -> None:
    from measure import machine  # beside this script; fit imports it too, for its Clock, and not from this folder

    parser = argparse.ArgumentParser(description="Rollouts per minute and final accuracy, beside TRL's.")
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--rollouts", type=int, default=22)
    options = parser.parse_args()

    version = run(options.trl_python, "-c", "from importlib.metadata import version; print(version('trl'))").strip()
    sides = {f"TRL {version}": lambda folder: trl(options.trl_python, options.rollouts, folder)}
    sides |= {name: lambda folder, config=config: ours(config, options.rollouts, folder) for name, config in OURS.items()}
    table = Table(title=f"{machine()}, {options.rollouts} rollouts")
    names = ("", "seconds a rollout", "fastest", "rollouts per minute", "TRL = 1", "kernel, of CPU time", "accuracy")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    first = None
    for name, side in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = side(Path(folder))
        seconds, minutes = outcome.seconds, sum(outcome.seconds) / 60
        first = first or minutes
        times = (f"{statistics.median(seconds):.1f}", f"{min(seconds):.1f}", f"{len(seconds) / minutes:.1f}")
        table.add_row(name, *times, f"{first / minutes:.1f}", f"{outcome.kernel:.0%}", f"{outcome.accuracy:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
