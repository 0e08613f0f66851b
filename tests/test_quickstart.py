"""The quickstart's own configs on the real model, cut to one small rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cppo_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
SCALARS = {
    "rollout/reward", "rollout/accuracy", "rollout/response_length", "rollout/truncated_share", "rollout/tokens_per_second",
    "train/loss", "train/entropy", "train/grad_norm", "train/tokens_per_second",
    "trust_region/divergence_mean", "mask/rate", "mask/by_position", "mask/by_budget", "mask/rate_at/00-10",
    "budget/exhausted_share", "budget/spent_mean", "mismatch/logp_gap_mean", "mismatch/logp_gap_max",
    "eval/avg@1", "eval/heldout_sums/avg@1",
}  # fmt: skip


def smaller(name: str, model: Path) -> dict[str, Any]:
    """One rollout of 4 x 6 answers, and one sample per held-out problem."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["trainer"]["max_epochs"] = 1
    config["model"]["policy"]["path"] = str(model)
    config["data"]["plan"] = {"prompts": 4, "samples": 6, "updates": 2}
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("EvalAccuracy"):
            callback["init_args"]["samples"] = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", pytest.param("quickstart_vllm", marks=pytest.mark.vllm)])
def test_one_rollout_of_the_real_model(
    name: str, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(smaller(name, smollm2_path)))
    main(["fit", "--config", "small.yaml"])
    printed = capsys.readouterr().out
    for part in ("accuracy, heldout_sums/avg@1", "seconds per rollout", "mask rate", f"--logdir runs/{name}", "Try next"):
        assert part in printed
    (folder,) = Path("runs", name).iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert any(tag.startswith("samples/") for tag in events.Tags()["tensors"])
    # float32 engine and trainer at equal weights: numerics alone, in nats and far below delta
    assert events.Scalars("mismatch/logp_gap_max")[0].value < 1e-3
    # Lightning counts 2 updates; the rollout stands at the steps its weights had seen
    assert [event.step for event in events.Scalars("rollout/reward")] == [0]
