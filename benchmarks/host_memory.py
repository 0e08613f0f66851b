"""Host memory over many rollouts: a small model is trained, and the memory of the run's processes noted after each rollout.

    python benchmarks/host_memory.py --rollouts 300

Memory is the proportional set size (pages that processes share are divided among them) of the trainer and of everything it
started, and the resident set of the trainer alone.  Options after ``--`` go to ``fit``.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from measure import machine
from rich.console import Console
from rich.table import Table

from cppo_lightning.cli import main as command

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

MIB = 2**20


class HostMemory(Callback):
    """Notes the memory in use after each rollout, and prints a table when training ends.

    Args:
        warm_up: rollouts after which growth is counted.
    """

    def __init__(self, warm_up: int = 20) -> None:
        super().__init__()
        self.warm_up = warm_up
        self.notes: list[tuple[float, float]] = []  # after each rollout: MiB of all processes, MiB of the trainer

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each rollout's last update, when what it left behind should be gone."""
        gc.collect()
        of_all = sum(proportional(process) for process in (os.getpid(), *descendants(os.getpid())))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.notes.append((of_all / MIB, resident / MIB))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs once: prints ten of the notes, and what was gained between the first and the last tenth of them."""
        counted = self.notes[self.warm_up :]
        tenth = max(1, len(counted) // 10)
        table = Table(title=f"{machine()}, {trainer.global_step} optimizer steps")
        for name in ("after rollout", "all processes, MiB", "trainer, MiB"):
            table.add_column(name, justify="right")
        for number, note in list(enumerate(self.notes, 1))[self.warm_up :: tenth]:
            table.add_row(str(number), *(f"{value:.1f}" for value in note))
        first, last = (
            [statistics.median(column) for column in zip(*part, strict=True)] for part in (counted[:tenth], counted[-tenth:])
        )
        table.add_row("growth*", *(f"{after - before:+.1f}" for before, after in zip(first, last, strict=True)))
        Console().print(table)
        print(f"* from the median of the first {tenth} rollouts after {self.warm_up} of warm-up to that of the last {tenth}")


def descendants(process: int) -> list[int]:
    """All processes that this one started, and those that they started."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def proportional(process: int) -> int:
    """Its proportional set size in bytes; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Host memory over many rollouts.")
    parser.add_argument("--config", default="configs/debug.yaml")
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=20, help="rollouts after which growth is counted")
    parser.add_argument("options", nargs="*", help="further options of fit, after --")
    options = parser.parse_args()

    epochs = ["--trainer.max_epochs", str(options.warm_up + options.rollouts)]
    # slow enough that rewards go on varying, since a rollout of equal ones is not trained on
    pace = ["--model.optimizer.init_args.lr=1e-5"]
    watch = ["--trainer.callbacks+=benchmarks.host_memory.HostMemory", f"--trainer.callbacks.warm_up={options.warm_up}"]
    with tempfile.TemporaryDirectory() as folder:
        logger = ["--trainer.logger.init_args.save_dir", folder]
        command(["fit", "--config", options.config, *epochs, *pace, *logger, *watch, *options.options])


if __name__ == "__main__":
    main()
