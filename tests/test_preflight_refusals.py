"""Model folders that cannot be read, and places that cannot be written to: refused before any weight is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cppo_lightning.cli import main
from cppo_lightning.errors import ConfigError
from cppo_lightning.policy_config import PolicyConfig, check_model_path
from cppo_lightning.preflight.before_loading import check_folders, check_optimizer, check_tokenizer, check_weight_files
from cppo_lightning.preflight.model_shape import without_weights
from cppo_lightning.resume import check_goes_on
from cppo_lightning.untrusted import check_no_code
from tests.user_folder import DEBUG

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


def cut(file: Path, size: int) -> None:
    """Leave the first ``size`` bytes, or all but the last ``-size``."""
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)


def in_files(folder: Path, *names: str) -> None:
    """An index of shards, the first of which is there."""
    (folder / WEIGHTS).rename(folder / names[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "empty": (lambda folder: cut(folder / WEIGHTS, 0), r"model\.safetensors is missing or not whole"),
    "header alone": (lambda folder: cut(folder / WEIGHTS, 1000), r"model\.safetensors is missing or not whole"),
    "without its end": (lambda folder: cut(folder / WEIGHTS, -4), r"model\.safetensors is missing or not whole"),
    "other bytes": (lambda folder: (folder / WEIGHTS).write_bytes(b"text" * 99), r"model\.safetensors is missing or not whole"),
    "a shard that is missing": (
        lambda folder: in_files(folder, "a.safetensors", "b.safetensors"),
        r"b\.safetensors is missing",
    ),
    "an index that is none": (
        lambda folder: [(folder / WEIGHTS).unlink(), (folder / INDEX).write_text("[")],
        "should say which file holds what",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weight_files_that_cannot_be_read(case: str, folder: Path) -> None:
    spoil, message = BROKEN[case]
    check_weight_files(str(folder))
    spoil(folder)
    with pytest.raises(ConfigError, match=f"{re.escape(repr(str(folder)))}.*{message}"):
        check_weight_files(str(folder))


def test_weight_files_that_can(folder: Path) -> None:
    in_files(folder, "a.safetensors", "a.safetensors")
    check_weight_files(str(folder))
    for file in (INDEX, "a.safetensors"):
        (folder / file).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    check_weight_files(str(folder))
    check_weight_files("owner/name")


def test_a_folder_without_its_tokenizer(folder: Path) -> None:
    check_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        check_tokenizer(str(folder))
    for file in folder.glob("tokenizer*"):  # of these transformers makes one with no vocabulary
        file.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["zzz", None])
def test_a_model_type_that_transformers_has_not(kind: str | None, folder: Path) -> None:
    settings = {**json.loads((folder / "config.json").read_text()), "model_type": kind}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"model_type in its config.json should be one of transformers .* got {kind!r}"):
        check_no_code(str(folder))


def test_a_model_that_is_no_causal_one(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="Unrecognized configuration class") as refused:
        without_weights(PolicyConfig(str(folder)))
    assert "\n" not in str(refused.value)


def test_a_file_is_not_said_to_be_missing(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; it should be the folder of a model"):
        check_model_path(str(folder / WEIGHTS))


def test_optimizers_are_made_of_parameters_like_the_models() -> None:
    check_optimizer(torch.optim.Muon, None, {2})
    with pytest.raises(ConfigError, match=r"model\.optimizer .* Muon only supports 2D parameters"):
        check_optimizer(torch.optim.Muon, None, {1, 2})


def test_places_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saving_to(place: Any) -> Any:
        return SimpleNamespace(loggers=[SimpleNamespace(save_dir=place)], checkpoint_callbacks=[])

    for place in (None, "s3://bucket/runs", tmp_path / "new" / "folder"):
        check_folders(saving_to(place))
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.logger: save_dir .* may not write to"):
        check_folders(saving_to(tmp_path / "new"))


def test_weights_alone_are_no_run() -> None:
    check_goes_on("last", {})
    check_goes_on("whole.ckpt", {"state_dict": {}, "optimizer_states": []})
    with pytest.raises(ConfigError, match=r"'weights\.ckpt' holds weights alone"):
        check_goes_on("weights.ckpt", {"state_dict": {}})


def test_the_checks_move_no_random_number(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.cli import LightningCLI

    from cppo_lightning import preflight
    from cppo_lightning.preflight import before_loading

    states: list[torch.Tensor] = []

    def noting(*args: Any, **kwargs: Any) -> None:
        states.append(torch.get_rng_state())
        before_loading.check_before_loading(*args, **kwargs)
        states.append(torch.get_rng_state())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "check_before_loading", noting)
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda *args: None)
    main(["fit", "--config", str(DEBUG), f"--model.policy.path={tiny_model_path}"])
    assert len(states) == 2
    assert torch.equal(*states)
