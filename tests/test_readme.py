"""The README does what it says: its commands run or parse, its files are executed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from cppo_lightning import trust_regions
from cppo_lightning.cli import main
from tests import user_folder
from tests.documents import blocks_of, contains, files_of

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
FIT = "python -m cppo_lightning fit "


BLOCKS = blocks_of(README)
FILES = files_of(BLOCKS)
COMMANDS = [line for block in BLOCKS for line in block.commands]
# what a reader types, and the error that answers
ANSWERS = re.findall(r"^\$ (.*)\n(error: .*)$", "".join(b.text for b in BLOCKS if b.language == "console"), re.MULTILINE)

# How each command of a `sh` block is tested.  A command that is not here fails test_every_command_is_tested.
BY_MAKE_N = {
    "git clone URL cppo_lightning && cd cppo_lightning && make quickstart": "quickstart",  # runs whole by hand: minutes
    "make quickstart-vllm": "quickstart-vllm",  # runs whole by hand: minutes
    "make debug": "debug",  # its fit command runs below, with one more config
}
TENSORBOARD = ".venv/bin/tensorboard --logdir runs"
RUN = [
    "python -m cppo_lightning fit --config configs/debug.yaml --config drift_cap.yaml",
    "python -m cppo_lightning fit --config configs/debug.yaml --config configs/trust_region/ppo_clip.yaml",
]
DATA = [
    "python -m cppo_lightning fit --config configs/debug.yaml --config configs/data/gsm8k.yaml "
    f"{more}--data.prompts.init_args.path problems.jsonl"
    for more in ("", "--config answer_and_form.yaml ")
]
RANKS = "python -m cppo_lightning fit --config configs/debug.yaml --config configs/strategy/fsdp2.yaml --trainer.devices 2"
DRY_RUN = "python -m cppo_lightning fit --config configs/debug.yaml --dry_run"
# tests/test_resume_check.py runs it
RESUME_CHECK = "python -m cppo_lightning resume-check --config configs/debug.yaml --kills 2"
CLUSTER = (
    "python -m cppo_lightning fit --config configs/base.yaml --config configs/trust_region/cppo.yaml --config cluster.yaml"
)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A folder with the configs, the tiny model and the README's own files, as a reader would have it."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which the command line adds the folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = user_folder.run([sys.executable, *shlex.split(command)[1:]], folder)
    assert done.returncode == 0, done.stderr
    return done


def resolved(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    """The configuration that a ``fit`` command would run with; parsing checks every key and type."""
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[3:], "--print_config"])
    captured = capsys.readouterr()
    assert end.value.code in (0, None), captured.err
    return yaml.safe_load(captured.out)


def test_every_command_is_tested() -> None:
    assert sorted(COMMANDS) == sorted([*BY_MAKE_N, TENSORBOARD, *RUN, *DATA, CLUSTER, DRY_RUN, RANKS, RESUME_CHECK])


def test_every_block_is_tested() -> None:
    own = {"drift_cap.py", "drift_cap.yaml", "problems.jsonl", "answer_and_form.yaml"}
    assert set(FILES) == own | {"cluster.yaml", "servers.yaml"}
    unnamed = {block.language for block in BLOCKS if block.file is None}
    assert unnamed == {"sh", "console", "text", "bibtex"}


@pytest.mark.parametrize("target", BY_MAKE_N.values())
def test_make_targets_run_a_fit_that_parses(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (command,) = [line.removeprefix(".venv/bin/") for line in done.stdout.splitlines() if FIT in line]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = resolved(command, capsys)
    assert config["trainer"]["accelerator"] == "cpu"


def test_make_targets_exist() -> None:
    targets = sorted(set(re.findall(r"\bmake ([a-z-]+)`", README)))
    assert {"debug", "test", "lint"} <= set(targets)
    done = subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tensorboard_has_the_option(tmp_path: Path) -> None:
    words = shlex.split(TENSORBOARD)
    program = Path(sys.executable).with_name(Path(words[0]).name)
    # --inspect reads the folder and ends, where the plain command would serve it
    (tmp_path / "runs").mkdir()
    done = subprocess.run([program, *words[1:], "--inspect"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No event files found within logdir runs" in done.stdout


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("file", ["cluster.yaml", "servers.yaml"])
def test_the_cluster_command_parses(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(CLUSTER.replace("cluster.yaml", file), capsys)
    for section, values in yaml.safe_load(FILES[file]).items():
        assert contains(config[section], values)


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_trust_regions_change_with_one_more_config(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert "rollout 3/3 | step" in done.stdout + done.stderr
    (saved,) = folder.glob("runs/debug/*/config.yaml")
    last = yaml.safe_load((folder / shlex.split(command)[-1]).read_text())
    assert contains(yaml.safe_load(saved.read_text()), last)


@pytest.mark.slow
def test_ranks(folder: Path) -> None:
    done = run(RANKS, folder)
    assert "rollout 3/3 | step" in done.stdout + done.stderr


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert "nothing was trained" in run(DRY_RUN, folder).stdout
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", DATA)
def test_own_problems(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert "rollout 3/3 | step" in done.stdout + done.stderr
    assert re.search(r"training +1 +0 +0 +0 +0 +1 ", done.stdout), done.stdout


@pytest.mark.parametrize(("command", "answer"), ANSWERS, ids=[command.split()[-2] for command, _ in ANSWERS])
@pytest.mark.usefixtures("in_folder")
def test_bad_settings_get_the_answer_shown(command: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command)[3:])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == answer


def test_two_bad_settings_are_shown() -> None:
    assert len(ANSWERS) == 2
    assert sum(block.text.count("$ ") for block in BLOCKS if block.language == "console") == 2


def test_trust_region_table() -> None:
    """Every class and every config of a trust region is in the table, and nothing else is."""
    rows = re.findall(r"^\| (`[A-Z].*?) \|.*\| (.*?) \|$", README.partition("## What is measured")[0], re.MULTILINE)
    classes = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert classes == set(trust_regions.__all__) - {"TrustRegion"}
    patterns = [name for row in rows for name in re.findall(r"`([\w*]+)`", row[1])]
    there = {file.stem for file in (REPOSITORY / "configs" / "trust_region").glob("*.yaml")}
    assert {name for name in there if any(fnmatch(name, pattern) for pattern in patterns)} == there
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in there)] == []


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src(?:set)?="([^"]+)"', README)
    local = [target for target in targets if not target.startswith("https://")]
    assert {"docs/mask.png", "docs/mask-dark.png", "LICENSE"} <= set(local)
    assert [target for target in local if not (REPOSITORY / target).is_file()] == []


def test_the_layout_names_what_is_there() -> None:
    (layout,) = [block.text for block in BLOCKS if block.language == "text"]
    missing = []
    for line in layout.splitlines():
        parent = "cppo_lightning" if line.startswith("  ") else "."
        names = re.findall(r"\b\w+(?:\.py\b|/)", line)
        places = [REPOSITORY / parent, REPOSITORY / parent / names[0]]  # beside the line's first name, or inside it
        missing += [name for name in names if not any((place / name).exists() for place in places)]
    assert missing == []


def test_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    """Compared by pixels with some room, since fonts are drawn a little differently by other versions."""
    subprocess.run([sys.executable, REPOSITORY / "docs" / "mask.py", tmp_path], check=True)
    for name in ("mask.png", "mask-dark.png"):
        committed, drawn = imread(REPOSITORY / "docs" / name), imread(tmp_path / name)
        assert committed.shape == drawn.shape
        # one bar in another colour is about 0.002 of the picture
        assert np.mean(np.abs(committed - drawn).max(-1) > 0.3) < 0.001
        assert (REPOSITORY / "docs" / name).stat().st_size < 150_000
