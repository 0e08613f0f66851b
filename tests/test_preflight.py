"""What ``fit --dry_run`` prints, against what the run then comes to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from cppo_lightning.batch import RolloutBatch
from cppo_lightning.cli import main
from cppo_lightning.engines import TransformersEngine
from cppo_lightning.preflight.batches import Batches
from cppo_lightning.preflight.section import Section
from cppo_lightning.preflight.versions import KNOWN_TROUBLE, Setup
from cppo_lightning.rollout import RolloutPlan
from cppo_lightning.sequences import micro_batches
from tests.user_folder import DEBUG

TWO_SHARDS = ["--trainer.devices=2", "--config={trainer: {strategy: {class_path: cppo_lightning.strategies.FSDP2}}}"]


@pytest.fixture
def in_tmp(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models/tiny``, which ``configs/debug.yaml`` names, as working directory, and a wide terminal."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are loaded, an engine that is started and a process that a strategy launches fail the test."""
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from transformers import AutoModelForCausalLM

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dry run should not have come here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(TransformersEngine, "start", refuse)
    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", refuse)


def fit(*arguments: str) -> None:
    main(["fit", "--config", str(DEBUG), *arguments])


def row(printed: str, name: str) -> str:
    """The other columns of the line that begins with ``name``, two blanks between them."""
    (found,) = re.findall(rf"^ *{re.escape(name)}  +(.*?) *$", printed, re.MULTILINE)
    return re.sub(" {2,}", "  ", found)


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_prints_what_the_run_would_come_to(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--dry_run")
    out = capsys.readouterr().out
    assert row(out, "responses per rollout").startswith("32 ")
    assert row(out, "responses per rank and step").startswith("16 ")
    assert row(out, "optimizer steps in all").startswith("6 ")
    assert row(out, "policy weights").startswith("0.5 MiB")
    assert row(out, "optimizer state").startswith("1.0 MiB  AdamW: 8 bytes per float32 parameter")
    assert row(out, "torch").startswith(torch.__version__)
    assert row(out, "delta_b") == "0.02"
    assert row(out, "divergence.k") == "20"
    assert "<|im_start|>assistant" in out  # special tokens are shown
    assert row(out, "verdict on an empty answer").startswith("wrong")  # Format looks for a letter
    assert row(out, "verdict on 'Answer: " + row(out, "gold answer") + "'").startswith("correct")
    assert "nothing was trained" in out
    assert [path.name for path in in_tmp.iterdir()] == ["models"]


@pytest.mark.usefixtures("nothing_starts")
def test_a_model_in_the_home_folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    fit("--dry_run", "--model.policy.path=~/models/tiny")
    assert "nothing was trained" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_starts", "in_tmp")
def test_two_ranks_are_looked_at_by_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        "--dry_run",
        *TWO_SHARDS,
        "--model.reference_kl.coef=0.1",
        "--trainer.precision=bf16-mixed",
        "--data.plan.max_staleness=1",
        "--data.engine.dtype=bfloat16",
    )
    out = capsys.readouterr().out
    assert row(out, "responses per rank and step").startswith("8 ")
    assert row(out, "age of a sample").startswith("at most 3 steps")
    assert "float32 masters" in row(out, "policy weights")
    assert "1/2 of it on each rank" in row(out, "gradients")
    assert row(out, "reference weights") == row(out, "policy weights").split("  ")[0] + "  frozen, 1/2 of it on each rank"
    assert "look at this: the engine samples" not in out  # in what the trainer computes in


@pytest.mark.usefixtures("nothing_starts", "in_tmp")
@pytest.mark.parametrize(("together", "trained"), [(1, 8), (2, 16)])
def test_ranks_that_compute_layers_together_sample_each_for_itself(
    together: int, trained: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--dry_run", *TWO_SHARDS, f"--trainer.strategy.init_args.tensor_parallel_size={together}")
    out = capsys.readouterr().out
    assert row(out, "responses per rank and step").startswith(f"{trained} ")
    assert "  16 responses of " in row(out, "engine's cache")
    assert "per rank x 2 ranks" in row(out, "peak, host memory")


@pytest.mark.usefixtures("nothing_starts", "in_tmp")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*TWO_SHARDS, "--trainer.strategy.init_args.replicas=3"],
            "error: trainer.strategy replicas = 3 does not divide 2 ranks",
        ),
        (["--trainer.devices=3", "--trainer.strategy=ddp"], "does not divide into 2 updates on 3 ranks; take a multiple of 6"),
        (["--model.policy.attn_implementation=flash_attention_2"], "error: model.policy: 'models/tiny' cannot be made"),
        (["--data.sampling.max_tokens=3000"], "leaves no room for a prompt in the context of 2048"),
        (["--trainer.strategy=dpd"], "error: trainer: You selected an invalid strategy name: `strategy='dpd'`"),
    ],
)
def test_what_cannot_work_ends_it(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fit("--dry_run", *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


class FirstProblem(Callback):
    """Keeps the id of the first problem that a run draws."""

    seen: str = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        FirstProblem.seen = FirstProblem.seen or trainer.datamodule.rollout.samples[0].problem.id


def test_the_run_draws_the_problem_that_was_shown_and_its_config_knows_of_no_dry_run(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--dry_run")
    shown = row(capsys.readouterr().out, "problem").split()[0]
    fit("--trainer.max_epochs=1", "--trainer.callbacks=[{class_path: tests.test_preflight.FirstProblem}]")
    assert FirstProblem.seen == shown
    (saved,) = in_tmp.glob("runs/debug/*/config.yaml")
    assert "dry_run" not in saved.read_text()


@pytest.mark.usefixtures("in_tmp")
def test_dry_run_is_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fit("--dry_run", "--print_config")
    assert end.value.code in (0, None)
    assert "dry_run" not in yaml.safe_load(capsys.readouterr().out)
    with pytest.raises(SystemExit) as end:
        fit("--config", "{dry_run: true}")
    assert end.value.code == 2
    assert "dry_run" in capsys.readouterr().err


def batches(**changes: Any) -> Batches:
    sizes: dict[str, Any] = {
        "plan": RolloutPlan(prompts=8, samples=4, updates=2),
        "ranks": 2,
        "prompt_tokens": [7] * 30,
        "max_tokens": 13,
        "micro_batch_tokens": 64,
        "context": None,
        "rollouts": 10,
    }
    return Batches(**sizes | changes)


@pytest.mark.parametrize("budget", [10, 20, 64, 100, 1000])
@pytest.mark.parametrize("response", [1, 6, 13])
def test_micro_batches_are_those_of_training(budget: int, response: int) -> None:
    found = batches(micro_batch_tokens=budget)
    rows = found.responses_per_update
    ones = torch.ones(rows, 7, dtype=torch.bool)
    zeros = torch.zeros(rows, response)
    numbers = torch.zeros(rows, dtype=torch.long)
    whole = RolloutBatch(ones.long(), ones, zeros.long(), zeros == 0, zeros, zeros[:, 0], zeros[:, 0], numbers, numbers)
    parts = micro_batches(whole, budget)
    assert found.micro_batches(response) == len(parts)
    assert max(part.sequences.source.numel() for part in parts) <= found.micro_batch


def test_steps_end_with_whichever_limit_comes_first() -> None:
    assert batches().optimizer_steps == 20
    assert batches(steps=15).optimizer_steps == 15
    assert batches(rollouts=None, steps=15).optimizer_steps == 15
    assert batches(rollouts=None).optimizer_steps is None
    assert len(batches(max_tokens=100, prompt_tokens=[7, 8]).section().warnings) == 2  # too long, and fewer problems than 8


GOOD = Setup(
    versions={"vllm": "0.32.0", "torchvision": "0.27.0+cpu"},
    cuda=False,
    on_cpu=True,
    ranks_here=2,
    threads=2,
    cores=4,
    engine_dtype="float32",
    compute="float32",
    budget=0.02,
    servers_elsewhere=False,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"vllm": "0.33.1"}}, "vLLM 0.33.1 is installed.*tested with >=0.32,<0.33"),
        ({"versions": {"torchvision": "0.27.0"}}, "torchvision may be a CUDA build"),
        ({"engine_dtype": "bfloat16"}, "samples in bfloat16 and the trainer computes in float32.*delta_b = 0.02"),
        ({"servers_elsewhere": True}, "--no-enable-chunked-prefill"),
        ({"threads": 3}, "2 ranks of 3 threads share 4 cores.*OMP_NUM_THREADS=2"),
    ],
)
def test_known_trouble(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPPO_ANY_VLLM", raising=False)
    assert [find(GOOD) for find in KNOWN_TROUBLE] == [None] * len(KNOWN_TROUBLE)
    (found,) = filter(None, (find(replace(GOOD, **change)) for find in KNOWN_TROUBLE))
    assert re.search(message, found)


def test_sections_are_tables_that_show_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """A gold answer or a path is no markup, and no emoji."""
    for body in ("[b]data.jsonl:100: no answer", None):
        Section("Title", [("answer", "[bold]3[/bold]", "data.jsonl:100: no answer")], body=body).print(Console(width=100))
        printed = capsys.readouterr().out
        assert "[bold]3[/bold]" in printed
        assert printed.count("data.jsonl:100: no answer") == (1 if body is None else 2)
