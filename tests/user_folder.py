"""A user's own folder outside the repository, with a trust region of theirs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DEBUG = Path(__file__).parents[1] / "configs" / "debug.yaml"

DRIFT_CAP = '''
from dataclasses import dataclass

from cppo_lightning.batch import Gate, TokenStats
from cppo_lightning.trust_regions import TrustRegion


@dataclass(frozen=True)
class DriftCap(TrustRegion):
    """Keeps a token while the response's summed |log rho| is below a cap."""

    cap: float = 1.0

    def __call__(self, stats: TokenStats) -> Gate:
        keep = stats.mask & (stats.ratio.log().abs().cumsum(-1) <= self.cap)
        return Gate(stats.ratio * keep, keep)
'''


def run(command: list[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new process in ``folder`` that finds the package as it is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def fit_own_trust_region(command: list[str], folder: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """``fit`` with ``DriftCap`` from ``folder``, where ``configs/debug.yaml`` finds its model."""
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(model)
    (folder / "drift_cap.py").write_text(DRIFT_CAP)
    (folder / "drift_cap.yaml").write_text("model: {trust_region: {class_path: drift_cap.DriftCap, init_args: {cap: 0.5}}}\n")
    return run(command, folder, "fit", "--config", str(DEBUG), "--config", "drift_cap.yaml")
