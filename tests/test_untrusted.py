"""Checkpoints, model folders and data sets are read as data: no code in them is run, and no setting comes from them."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cppo_lightning.cli import main
from cppo_lightning.engines.requests import eos_token_ids, read_config
from cppo_lightning.errors import ConfigError
from cppo_lightning.module import RLVRModule
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import DatasetPrompts, TransformersEngine
from cppo_lightning.trust_regions import PPOClip
from tests.test_architecture import REPOSITORY
from tests.test_fit import make_data, make_module, make_trainer

DEBUG = str(REPOSITORY / "configs" / "debug.yaml")
SECRET = "hf_this-must-appear-nowhere"


class Trap:
    """Pickled, it is a call that makes a file: what unpickles it has run code of the pickle's choice."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """One rollout of the debug config from the command line, with a secret in the environment and a checkpoint at its end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        for name in ("HF_TOKEN", "WANDB_API_KEY", "SOME_PASSWORD"):
            patch.setenv(name, SECRET)
        main(["fit", "--config", DEBUG, "--trainer.max_epochs=1", "--trainer.enable_checkpointing=true"])
    return folder


@pytest.fixture
def checkpoint(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A checkpoint of ours; the working folder is where the debug config finds its model."""
    monkeypatch.chdir(run_folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (file,) = run_folder.glob("runs/debug/version_0/checkpoints/*.ckpt")
    return torch.load(file, weights_only=True)


@pytest.fixture
def hostile(checkpoint: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint that would make the file ``trapped`` beside itself."""
    torch.save({**checkpoint, "extra": Trap(tmp_path / "trapped")}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which ``fit`` ends, before any rollout."""
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", DEBUG, *arguments])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "rollout 1/" not in captured.out + captured.err
    (line,) = [line for line in captured.err.splitlines() if "ckpt_path" in line or line.startswith("error")]
    return line.removeprefix("error: ")


def test_the_trap_works(hostile: Path) -> None:
    torch.load(hostile, weights_only=False)
    assert (hostile.parent / "trapped").exists()


@pytest.fixture
def url(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TORCH_HOME", str(hostile.parent / "downloads"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(hostile.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{hostile.name}"
        server.shutdown()


@pytest.mark.parametrize("how", ["path", "file://", "http://", "last"])
def test_the_command_line_refuses_a_checkpoint_with_objects(
    how: str, hostile: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"path": str(hostile), "file://": f"file://{hostile}", "http://": url, "last": "last"}[how]
    keeper = [
        "--trainer.enable_checkpointing=true",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.init_args.dirpath={hostile.parent}",
    ]
    line = refused(capsys, f"--ckpt_path={given}", *(keeper if how == "last" else ()))
    assert "last.ckpt' holds more than tensors and plain values" in line
    assert "posix.system" in line
    assert not (hostile.parent / "trapped").exists()


def test_how_checkpoints_are_read_is_no_setting(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "weights_only" in refused(capsys, f"--ckpt_path=file://{hostile}", "--weights_only=false")
    assert not (hostile.parent / "trapped").exists()


def test_the_trainer_refuses_it_even_when_told_to_unpickle(hostile: Path, tmp_path: Path) -> None:
    data = make_data(Path("models/tiny"))
    try:
        with pytest.raises(ConfigError, match="holds more than tensors"):
            make_trainer(tmp_path, []).fit(
                make_module(Path("models/tiny")), datamodule=data, ckpt_path=hostile, weights_only=False
            )
    finally:
        data.close()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("weights_only", [None, False])
def test_load_from_checkpoint(weights_only: bool | None, hostile: Path, checkpoint: dict[str, Any]) -> None:
    parts: dict[str, Any] = {"policy": PolicyConfig("models/tiny"), "trust_region": PPOClip(), "weights_only": weights_only}
    with pytest.raises(ConfigError, match="holds more than tensors"):
        RLVRModule.load_from_checkpoint(hostile, **parts)
    assert not (hostile.parent / "trapped").exists()
    torch.save(checkpoint, hostile)
    module = RLVRModule.load_from_checkpoint(hostile, **parts)
    for name, weight in module.named_weights():
        assert torch.equal(weight, checkpoint["state_dict"][f"policy.model.{name}"])


def test_weights_of_another_model(hostile: Path, checkpoint: dict[str, Any]) -> None:
    """What is wrong is said in a line, and not that the file is broken."""
    parts: dict[str, Any] = {"policy": PolicyConfig("models/tiny"), "trust_region": PPOClip()}
    weights = checkpoint["state_dict"]
    name = next(iter(weights))
    for changed, words in (
        (
            {n: w for n, w in weights.items() if n != name},
            f"the checkpoint lacks 1 weights of this run's model, {name} for one",
        ),
        (
            {**weights, "policy.model.more": weights[name]},
            "is of another model: it has policy.model.more, which this one has not",
        ),
        ({**weights, name: weights[name][:1]}, f"is of another model: {name} is "),
    ):
        torch.save({**checkpoint, "state_dict": changed}, hostile)
        with pytest.raises(ConfigError) as error:
            RLVRModule.load_from_checkpoint(hostile, **parts)
        assert words in str(error.value)


BROKEN = {
    "missing": (None, "No such file"),
    "empty": (b"", "is no checkpoint"),
    "text": (b"weights", "is no checkpoint"),
    "a plain pickle": (b"\x80\x04N.", "is no checkpoint"),
    "half": ("half", "is no checkpoint, or not a whole one"),
    "weights alone": ({"state_dict": {}}, "was not saved by a Trainer: it lacks ['pytorch-lightning_version']"),
    "a list": ([1], "was not saved by a Trainer: it lacks ['pytorch-lightning_version', 'state_dict']"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.usefixtures("checkpoint")
def test_files_that_are_no_checkpoint(case: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BROKEN[case]
    file = tmp_path / "broken.ckpt"
    if content == "half":
        (whole,) = run_folder.glob("runs/debug/version_0/checkpoints/*.ckpt")
        content = whole.read_bytes()[:50_000]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    line = refused(capsys, f"--ckpt_path={file}")
    assert str(file) in line
    assert message in line


def test_a_checkpoint_resumes_and_changes_no_setting(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**checkpoint, "hyper_parameters": {"max_grad_norm": 777.0, "anchor": "recomputed"}}, tmp_path / "x.ckpt")
    name = f"--trainer.logger.init_args.save_dir={tmp_path}"
    main(["fit", "--config", DEBUG, f"--ckpt_path={tmp_path / 'x.ckpt'}", "--trainer.max_epochs=2", name,
          "--trainer.enable_checkpointing=true"])  # fmt: skip
    (config,) = tmp_path.rglob("config.yaml")
    settings = yaml.safe_load(config.read_text())["model"]
    assert (settings["max_grad_norm"], settings["anchor"]) == (1.0, "rollout")
    (resumed,) = tmp_path.rglob("checkpoints/*.ckpt")
    assert torch.load(resumed, weights_only=True)["epoch"] == 1


def test_no_secret_of_the_environment_is_written(run_folder: Path, checkpoint: dict[str, Any]) -> None:
    files = [file for file in run_folder.joinpath("runs").rglob("*") if file.is_file()]
    assert {"config.yaml"} < {file.name for file in files}
    assert any(file.suffix == ".ckpt" for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


# --- model folders and data sets


@pytest.fixture
def with_code(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with modules of its own for configuration, model and tokenizer, which make ``trapped`` when imported."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "with_code"))
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_own.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\nclass Own: model_type = 'own'\n")
    models = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(folder / "config.json", auto_map=models)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own"] * 2}, tokenizer_class="Own")
    return folder


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_beside_a_known_model_is_ignored(with_code: Path, tmp_path: Path) -> None:
    RLVRModule(PolicyConfig(str(with_code)), PPOClip())
    Policy.load(PolicyConfig(str(with_code)))
    eos_token_ids(str(with_code), read_config(str(with_code)))
    engine = TransformersEngine()
    engine.start(str(with_code))
    engine.close()
    assert not (tmp_path / "trapped").exists()


def test_a_model_that_needs_its_own_code_is_refused(
    with_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(with_code / "config.json", model_type="own")
    with pytest.raises(ConfigError, match="should be a folder or hub id"):
        TransformersEngine().start(str(with_code))
    with pytest.raises(ValueError, match="custom code"):
        Policy.load(PolicyConfig(str(with_code)))
    line = refused(capsys, f"--model.policy.path={with_code}")
    assert "comes with Python code of its own (auto_map in config.json), which is never run" in line
    assert not (tmp_path / "trapped").exists()


def test_a_model_type_that_cannot_be_read_is_refused(with_code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (with_code / "config.json").write_text("{")
    line = refused(capsys, f"--model.policy.path={with_code}")
    assert line.startswith(f"model.policy.path {str(with_code)!r} should have a config.json that can be read: ")


def test_pickled_weights_are_read_as_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap(tmp_path / "trapped")}, folder / "pytorch_model.bin")
    for load in (lambda: Policy.load(PolicyConfig(str(folder))), lambda: TransformersEngine().start(str(folder))):
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            load()
    assert not (tmp_path / "trapped").exists()


def test_a_data_sets_own_script_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\n")
    with pytest.raises((ConfigError, RuntimeError), match="scripts are no longer supported"):
        DatasetPrompts(str(folder)).load()
    assert not (tmp_path / "trapped").exists()
