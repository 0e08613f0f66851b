"""The quickstart's task with TRL's GRPOTrainer and with this project: rollouts per minute and final accuracy.

    python benchmarks/vs_trl.py --trl-python ENVIRONMENT/bin/python

TRL needs an environment of its own.  Model, prompts and their order, samples, longest responses, updates and learning rate
are the same; each side runs alone, one after the other.  Accuracy is avg@8 on held-out sums, by this project's ``validate``
for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def ours(config: str, rollouts: int, folder: Path) -> tuple[list[float], float]:
    """Seconds of each rollout, and final accuracy; trained with the shipped config, its callbacks left out."""
    saves = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_epochs": rollouts}
    checkpoints = {"class_path": "cppo_lightning.callbacks.RunCheckpoint", "init_args": saves}
    clock = {"class_path": "benchmarks.vs_trl.Clock", "init_args": {"file": str(folder / "seconds.json")}}
    more = {"trainer": {"callbacks": [clock, checkpoints], "enable_checkpointing": True, "max_epochs": rollouts}}
    (folder / "more.yaml").write_text(yaml.safe_dump(more))
    logger = f"--trainer.logger.init_args.save_dir={folder}"
    run(*COMMAND, "fit", "--config", config, "--config", str(folder / "more.yaml"), logger)
    (resolved,) = folder.glob("*/*/config.yaml")
    run(*COMMAND, "export", "--config", str(resolved), str(folder / "last.ckpt"), str(folder / "model"))
    return json.loads((folder / "seconds.json").read_text()), accuracy(folder)


def trl(python: str, rollouts: int, folder: Path) -> tuple[list[float], float]:
    """The same of TRL."""
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
    printed = run(python, str(Path(__file__).with_name("trl_side.py")), str(folder / "settings.json"))
    return json.loads(printed.splitlines()[-1]), accuracy(folder)


def accuracy(folder: Path) -> float:
    """avg@8 on held-out sums of the model saved in ``folder / "model"``."""
    own = ["--model.policy.path", str(folder / "model"), f"--trainer.logger.init_args.save_dir={folder}"]
    run(*COMMAND, "validate", "--config", OURS["embedded engine"], *own)
    (found,) = folder.glob("*/*/evaluations/evaluation/*.json")
    return json.loads(found.read_text())["estimates"]["avg@8"]["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollouts per minute and final accuracy, beside TRL's.")
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--rollouts", type=int, default=22)
    options = parser.parse_args()

    version = run(options.trl_python, "-c", "from importlib.metadata import version; print(version('trl'))").strip()
    sides = {f"TRL {version}": lambda folder: trl(options.trl_python, options.rollouts, folder)}
    sides |= {name: lambda folder, config=config: ours(config, options.rollouts, folder) for name, config in OURS.items()}
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.rollouts} rollouts")
    for name in ("", "seconds a rollout", "rollouts per minute", "TRL = 1", "accuracy"):
        table.add_column(name, justify="right" if name else "left")
    first = None
    for name, side in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, right = side(Path(folder))
        median, minutes = statistics.median(seconds), sum(seconds) / 60
        first = first or minutes
        table.add_row(name, f"{median:.1f}", f"{len(seconds) / minutes:.1f}", f"{first / minutes:.1f}", f"{right:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
