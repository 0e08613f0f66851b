"""One run of the comparison: ``fit`` in a process of its own, a fork of the sweep's that has imported everything already."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.comparison.cost import Times
from benchmarks.comparison.grid import REPOSITORY, Run, Study, region_settings
from benchmarks.measure import setup
from cppo_lightning.cli import main
from cppo_lightning.verifiers.worker import die_with_parent

# what `fit` imports once it runs; here, every fork has it already
for name in (
    *(f"cppo_lightning.{module}" for module in ("callbacks", "datamodule", "module", "parser", "preflight", "resume")),
    "benchmarks.comparison.recorder",
    "lightning.pytorch.cli",
    "omegaconf",
    "pandas",  # which pyarrow looks for when it makes its first array
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)


@dataclass(frozen=True)
class Place:
    """Where one run keeps what.

    Args:
        folder: of this run alone, for as long as it is made of the same.
    """

    folder: Path

    @property
    def made_of(self) -> str:
        """A digest of all that the run is made of."""
        return self.folder.name

    @property
    def result(self) -> Path:
        """Rows for ``results.assemble``; there when the run is done."""
        return self.folder / "result.parquet"

    @property
    def times(self) -> Path:
        """What it cost; a run that was killed right behind its result has none."""
        return self.folder / "times.json"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "log.txt"

    @property
    def scratch(self) -> Path:
        """What else ``fit`` writes; deleted at the end."""
        return self.folder / "scratch"


def settings(study: Study, run: Run, model: Path) -> dict[str, Any]:
    """What the task's config is overridden with.  Prompts, samples and initial weights follow from task and seed alone."""
    rollouts = study.tasks[run.task].rollouts
    return {
        **({"trainer": {"max_epochs": rollouts}} if rollouts else {}),
        "seed_everything": run.seed,
        "model": {
            "policy": {"path": str(model)},
            "trust_region": region_settings(study.methods[run.method], f"methods.{run.method}"),
            "optimizer": {"init_args": {"lr": run.learning_rate}},
        },
        "data": {"plan": {"passes": run.reuse}},
    }


def carry_out(study: Study, run: Run, model: Path, place: Place, core: int, sweep: int, options: list[str]) -> None:
    """Train, and leave the result.  Does not outlive the process ``sweep``; exits as ``fit`` does.

    Args:
        core: that it has for itself.
        options: further ones of ``fit``.
    """
    die_with_parent(sweep)
    os.sched_setaffinity(0, {core})
    os.chdir(REPOSITORY)
    shutil.rmtree(place.scratch, ignore_errors=True)
    place.scratch.mkdir(parents=True)
    config = place.scratch / "run.yaml"
    config.write_text(yaml.safe_dump(settings(study, run, model)))
    # from here on what goes wrong is in the log, which on a full disk takes nothing
    with place.log.open("wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    started = time.perf_counter()
    try:
        main(
            [
                *("fit", "--config", study.tasks[run.task].config, "--config", str(config)),
                *("--trainer.logger=false", f"--trainer.default_root_dir={place.scratch}", *options),
                *(
                    "--trainer.callbacks+=benchmarks.comparison.recorder.RunRecorder",
                    f"--trainer.callbacks.file={place.result}",
                ),
            ]
        )
    finally:
        shutil.rmtree(place.scratch, ignore_errors=True)
        _times(time.perf_counter() - started).save(place.times)


def _times(seconds: float) -> Times:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Times(seconds, sum(usage.ru_utime + usage.ru_stime for usage in used), setup())
