"""The command line: shipped configs, bad input, a trust region of the user's own, and every subcommand."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cppo_lightning.cli import main
from tests import user_folder

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
WHOLE = ["quickstart", "quickstart_vllm", "debug", "sums"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load weights fails the test."""
    from transformers import AutoModelForCausalLM

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the settings were checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def in_tmp(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models/tiny``, which ``configs/debug.yaml`` names, as working directory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def fit_debug(*arguments: str, subcommand: str = "fit") -> None:
    main([subcommand, "--config", str(CONFIGS / "debug.yaml"), *arguments])


def in_yaml(text: str) -> list[str]:
    """A config of this text, which need not be a file."""
    return ["--config", text]


DIVERGENCE = "--model.trust_region.init_args.divergence"
BAD_INPUT = {
    "misspelt key": (["--model.polcy.path=x"], r"model\.polcy\.path.*did you mean model\.policy\.path\?$"),
    "misspelt class key": (["--model.trust_regoin=CPPO"], r"model\.trust_regoin.*did you mean model\.trust_region\?$"),
    "two misspelt keys": (["--dry_rn", "--trainer.max_epoch=3"], r"did you mean dry_run, trainer\.max_epochs\?$"),
    "key cut short": (["--model.micro_batch_token=512"], r"did you mean model\.micro_batch_tokens\?$"),
    "key like no other": (["--model.zzz=1"], r"unrecognized arguments: --model\.zzz=1$"),
    "misspelt section in YAML": (in_yaml("{modell: {policy: {path: x}}}"), r"did you mean model\.policy\.path\?$"),
    "misspelt key in YAML": (
        in_yaml("{model: {trust_regoin: {class_path: CPPO}}}"),
        r"trust_regoin\.class_path'; did you mean model\.trust_region\?$",
    ),
    "misspelt deep key in YAML": (in_yaml("{data: {plan: {promts: 8}}}"), r"did you mean data\.plan\.prompts\?$"),
    "misspelt key in init_args in YAML": (
        in_yaml("{model: {trust_region: {class_path: CPPO, init_args: {detla: 1}}}}"),
        r"'detla' is not accepted; did you mean delta\?$",
    ),
    "misspelt key in a list in YAML": (
        in_yaml("{trainer: {callbacks: [{class_path: cppo_lightning.callbacks.MaskRate, init_args: {bin: 4}}]}}"),
        r"'bin' is not accepted.*did you mean bins\?$",
    ),
    "misspelt key in an optional setting": (
        in_yaml("{data: {evaluation: {prompts: {class_path: ReasoningGymPrompts, init_args: {nme: x}}}}}"),
        r"'nme' is not accepted.*did you mean name\?$",
    ),
    "misspelt key of a class": (
        ["--model.trust_region.init_args.detla=1"],
        r"'detla' is not accepted; did you mean delta\?$",
    ),
    "misspelt key of a class within": ([f"{DIVERGENCE}.init_args.kk=3"], r"'kk' is not accepted; did you mean k\?$"),
    "misspelt key of an optimizer": (["--model.optimizer.init_args.lrr=1"], r"'lrr' is not accepted.*did you mean lr\?$"),
    "misspelt key that a callback inherits": (
        in_yaml("{trainer: {callbacks: [{class_path: RunCheckpoint, init_args: {save_topk: 1}}]}}"),
        r"'save_topk' is not accepted.*did you mean save_top_k\?$",
    ),
    "unknown class": (
        ["--model.trust_region=cppo_lightning.trust_regions.CPO"],
        r"did you mean cppo_lightning\.trust_regions\.CPPO\?$",
    ),
    "unknown class by name": (["--model.trust_region=CPO"], r"did you mean CPPO\?$"),
    "unknown class within": ([f"{DIVERGENCE}=TopKTVV"], r"did you mean TopKTV\?$"),
    "unknown module": (
        ["--model.trust_region=cppo_lightning.trust_region.CPPO"],
        r"did you mean cppo_lightning\.trust_regions\.CPPO\?$",
    ),
    "unknown optimizer": (["--model.optimizer=AdmW"], r"did you mean AdamW\?$"),
    "unknown callback": (["--trainer.callbacks+=MaskRte"], r"did you mean MaskRate\?$"),
    "unknown word": (["--model.policy.dtype=flaot32"], r"Got value: flaot32; did you mean float32\?$"),
    "wrong type": (["--data.plan.prompts=many"], "data.plan.prompts"),
    "prompts that do not divide": (["--data.plan.prompts=5"], "data.plan.prompts = 5 .* does not divide"),
    "top-p": (["--data.sampling.top_p=0.9"], r"top_p 0\.9.*train with top_p 1"),
    "top-k": (["--data.sampling.top_k=50"], "top_k 50"),
    "min-p": (["--data.sampling.min_p=0.1"], r"min_p 0\.1"),
    "greedy": (["--data.sampling.temperature=0"], "temperature must be above 0"),
    "a temperature without end": (["--data.sampling.temperature=.inf"], r"temperature must be above 0 and finite.*got inf"),
    "a norm that is no number": (["--model.max_grad_norm=.nan"], r"model\.max_grad_norm must be above 0 and finite.*got nan"),
    "delta": (["--model.trust_region.init_args.delta=0"], r"CPPO\.delta must be above 0 .* got 0"),
    "w_min": (["--model.trust_region.init_args.w_min=1.5"], r"CPPO\.w_min must be in \(0, 1\] .* got 1\.5"),
    "K": (["--model.trust_region.init_args.divergence.init_args.k=0"], r"TopKTV\.k must be at least 1, got 0"),
    "K beyond the vocabulary": (["--model.trust_region.init_args.divergence.init_args.k=500"], "500.*260"),
    "inside an optional setting": (["--model.reference_kl.coef=-1"], r"reference_kl\.coef must be above 0, got -1"),
    "seed": (["--seed_everything=-5"], r"seed_everything: -5 .* from 0 to \d+"),
    "number of devices": (["--trainer.devices=-1"], r"trainer: .*devices.* should be an int > 0"),
    "learning rate": (["--model.optimizer.init_args.lr=-1"], r"model\.optimizer .* Invalid learning rate: -1\.0$"),
    "settings of an optimizer": (["--model.optimizer.init_args.foreach=true"], r"model\.optimizer .*fused.* and .*foreach"),
    "settings of a schedule": (
        ["--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.init_args.T_max=0"],
        r"model\.lr_scheduler .* ZeroDivisionError",
    ),
    "attention": (["--model.policy.attn_implementation=sdpaa"], r"model\.policy.*sdpaa.*is not supported"),
    "one of two types": (
        in_yaml("{data: {verifier: {class_path: VerifierPool, init_args: {verifier: MathAnswer, workers: 0}}}}"),
        r"error: VerifierPool\.workers must be at least 1, got 0$",
    ),
    "a library's class": (
        in_yaml("{trainer: {callbacks: [{class_path: RunCheckpoint, init_args: {save_top_k: -5}}]}}"),
        r"error: Invalid value for save_top_k=-5",
    ),
    "Lightning's clipping": (["--trainer.gradient_clip_val=2"], r"trainer\.gradient_clip_val = 2.* model\.max_grad_norm"),
    "Lightning's accumulation": (["--trainer.accumulate_grad_batches=4"], r"trainer\.accumulate_grad_batches must be 1, got 4"),
    "logs below a file": (
        ["--trainer.logger.init_args.save_dir=models/tiny/config.json"],
        r"save_dir .*config\.json.* is a file",
    ),
    "a file as a model": (["--model.policy.path=models/tiny/config.json"], r"model\.policy\.path .*config\.json' is a file"),
    "missing folder": (["--model.policy.path=models/none"], "'models/none' does not exist"),
    "missing data": (["--data.prompts=DatasetPrompts", "--data.prompts.path=none.jsonl"], r"none\.jsonl"),
    "unknown task": (["--data.prompts.init_args.name=basic_aritmetic"], "no task 'basic_aritmetic'; near: basic_arithmetic"),
}


@pytest.mark.usefixtures("no_model", "in_tmp")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_line_before_any_model_is_loaded(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_INPUT[case]
    with pytest.raises(SystemExit) as end:
        fit_debug(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "usage:" not in error
    assert re.search(message, error.strip(), re.DOTALL), error


@pytest.mark.usefixtures("no_model", "in_tmp")
@pytest.mark.parametrize("case", [case for case in BAD_INPUT if case.endswith("key in YAML")])
def test_a_file_is_read_like_the_same_text(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, text), message = BAD_INPUT[case]
    (tmp_path / "misspelt.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        fit_debug("--config", "misspelt.yaml")
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip(), re.DOTALL)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"problem": "1+1", "answer": "2"}', "", '{"problem": "1+2"}'], r"rows\.jsonl:3.*answer"),
        (['{"answer": "2"}'], r"rows\.jsonl:1.*problem"),
        (["{not json"], r"rows\.jsonl:1"),
        ([], r"rows\.jsonl"),
    ],
    ids=["no answer", "no problem", "not JSON", "empty"],
)
def test_bad_rows_are_named_by_file_and_line(
    in_tmp: Path, rows: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(SystemExit):
        fit_debug("--data.prompts=DatasetPrompts", "--data.prompts.path=rows.jsonl")
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("no_model", "in_tmp")
def test_vllm_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    with pytest.raises(SystemExit):
        fit_debug("--data.engine=VLLMEngine")
    assert "pip install" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model", "in_tmp")
def test_an_interpolation_of_another_files_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.yaml").write_text("model: {micro_batch_tokens: '${data.sampling.max_tokens}'}")
    with pytest.raises(SystemExit) as end:
        fit_debug("--config", "more.yaml")
    assert end.value.code == 2
    assert "data" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model", "in_tmp")
def test_more_top_k_than_vllm_returns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found("torch") if name == "vllm" else found(name, *a))
    monkeypatch.setenv("CPPO_ANY_VLLM", "1")  # the one that is not there has no version
    with pytest.raises(SystemExit):
        fit_debug("--data.engine=VLLMEngine", "--model.trust_region.init_args.divergence.init_args.k=50")
    assert "top 50 tokens, but VLLMEngine returns at most 20" in capsys.readouterr().err


@pytest.mark.parametrize("name", WHOLE)
def test_shipped_configs_parse(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", f"configs/{name}.yaml", "--print_config"])
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["trust_region"]["class_path"].startswith("cppo_lightning.trust_regions.")


def test_the_two_quickstarts_differ_in_the_engine_alone() -> None:
    embedded, vllm = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()) for n in ("quickstart", "quickstart_vllm"))
    for config in (embedded, vllm):
        config["data"].pop("engine")
        config["trainer"]["logger"]["init_args"].pop("name")
        config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "RunSummary" not in c["class_path"]]
    assert embedded == vllm


def test_quickstart_has_the_keys_of_base() -> None:
    quickstart, base = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()) for n in ("quickstart", "base"))
    for section in ("model", "data"):
        assert set(quickstart[section]) <= set(base[section]) | {"trust_region", "evaluation"}


@pytest.mark.usefixtures("in_tmp")
def test_interpolation_inside_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.yaml").write_text(
        "data: {sampling: {max_tokens: 12}}\n"
        "model: {aggregation: {kind: seq-mean-token-sum-norm, horizon: '${data.sampling.max_tokens}'}}\n"
    )
    with pytest.raises(SystemExit):
        fit_debug("--config", "more.yaml", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["model"]["aggregation"]["horizon"] == 12


def test_a_users_own_trust_region_from_their_own_folder(tmp_path: Path, tiny_model_path: Path) -> None:
    done = user_folder.fit_own_trust_region([sys.executable, "-m", "cppo_lightning"], tmp_path, tiny_model_path)
    assert done.returncode == 0, done.stderr
    assert "rollout 3/3 | step" in done.stdout + done.stderr
    (saved,) = tmp_path.glob("runs/debug/*/config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["trust_region"]["class_path"] == "drift_cap.DriftCap"


@pytest.mark.slow
def test_two_ranks_share_a_rollout(in_tmp: Path) -> None:
    """Ranks get other prompts, other numbers of groups and micro-batches, and must neither wait for ever nor drift apart."""
    settings = {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "trainer.enable_checkpointing": "true",
        "model.micro_batch_tokens": 100,
        "data.plan.prompts": 8,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "cppo_lightning", "fit", "--config", str(CONFIGS / "debug.yaml")]
    done = user_folder.run(command, in_tmp, *arguments)
    assert done.returncode == 0, done.stderr
    assert "rollout 3/3 | step" in done.stdout + done.stderr
    (checkpoint,) = in_tmp.glob("runs/debug/*/checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] > 0


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluating_subcommands(subcommand: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {
        "class_path": "cppo_lightning.rollout.ReasoningGymPrompts",
        "init_args": {"name": "basic_arithmetic", "size": 5, "params": {"operators": ["+"]}},
    }
    evaluation = {"prompts": held_out, "samples": 2, "sampling": {"temperature": 0.7, "max_tokens": 6}}
    (in_tmp / "evaluation.yaml").write_text(json.dumps({"data": {"evaluation": evaluation}}))
    fit_debug("--config", "evaluation.yaml", subcommand=subcommand)
    out = capsys.readouterr().out
    if subcommand == "predict":
        (written,) = in_tmp.rglob("predictions.jsonl")
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        assert len(rows) == 10
        places, answers = {"set", "number", "sample", "id", "step"}, {"outcome", "reward", "tokens", "finished"}
        assert set(rows[0]) == places | answers | {"prompt", "response", "answer", "extracted"}
    else:
        assert f"{'val' if subcommand == 'validate' else 'test'}/accuracy" in out
        assert "Evaluation at step 0, 2 samples per problem" in out
        (kept,) = in_tmp.rglob("evaluations/evaluation/step=0.parquet")
        assert pq.read_metadata(kept).num_rows == 10


@pytest.mark.usefixtures("in_tmp", "no_model")
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_without_an_evaluation_it_is_said_what_is_missing(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fit_debug(subcommand=subcommand)
    assert end.value.code == 2
    assert f"data.evaluation is not set; {subcommand} needs to know what to sample" in capsys.readouterr().err
