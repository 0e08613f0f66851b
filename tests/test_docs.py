"""The pages of docs/ do what they say: their commands run or parse, their files are executed, and they make a site."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cppo_lightning.cli import main
from cppo_lightning.engines.vllm_server.process import how_to_serve
from cppo_lightning.engines.vllm_server.weight_transfer import WAYS
from cppo_lightning.errors import ConfigError
from cppo_lightning.metric_dictionary import find
from cppo_lightning.prompts.prompt_source import check_problems
from cppo_lightning.rollout.settings import check_same_on_ranks
from cppo_lightning.verifiers.base import Outcome, Problem, Verdict
from cppo_lightning.verifiers.math_answer import MathAnswer
from tests.documents import blocks_of, contains, files_of
from tests.test_architecture import ORDER

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text()
# the folders that are links hold README and the notebooks, which have tests of their own
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md")) if path.name != "readme.md"}
COMMANDS = {page: [line for block in blocks_of(text) for line in block.commands] for page, text in PAGES.items()}
MODULE = "-m cppo_lightning "

TESTED_ELSEWHERE = {
    "replay.md": "tests/test_replay.py",
    "engines.md": "below, without the vLLM that its server needs",
    "theory.md": "tests/test_theory.py",
}
# commands that are parsed and not run, by pattern, and why
PARSED = {
    "* --config configs/base.yaml *": "needs GPUs, vLLM and the hub",
    "* resume-check --config configs/debug.yaml --kills 2": "tests/test_resume_check.py runs it",
    "* export runs/qwen3-1.7b-base/*": "the run needs GPUs",
    "* --config configs/debug.yaml --config mine.yaml": "needs a GPU and a model; on the tiny model it runs",
}
# where pages' classes are looked for
PUBLIC = (
    "batch",
    "callbacks",
    "datamodule",
    "divergences",
    "errors",
    "module",
    "rollout",
    "strategies",
    "theory",
    "trust_regions",
    "verifiers",
)
# files that no command of their page reads, and the config after which a reader names them
READ_AFTER = {"elsewhere.yaml": "configs/base.yaml", "slow_verifier.yaml": "configs/debug.yaml"}
PAGES_TO_RUN = ["howto/resume_and_export.md", "howto/evaluate.md", *sorted(page for page in PAGES if page.startswith("howto/"))]


def is_parsed(command: str) -> bool:
    return any(fnmatch(command, pattern) for pattern in PARSED)


def arguments(command: str) -> list[str]:
    """What the command line gets, whatever starts it."""
    return shlex.split(command.partition(MODULE)[2])


def resolved(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that a command would run with; parsing checks every key and type."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    captured = capsys.readouterr()
    assert end.value.code in (0, None), captured.err
    return yaml.safe_load(captured.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """A reader's folder: the configs, the tiny model, and all files that README and the pages have them save."""
    home = tmp_path_factory.mktemp("reader")
    shutil.copytree(REPOSITORY / "configs", home / "configs")
    (home / "models").mkdir()
    (home / "models" / "tiny").symlink_to(tiny_model_path)
    for text in [README, *PAGES.values()]:
        for name, content in files_of(blocks_of(text)).items():
            assert not (home / name).exists(), f"two pages have a {name}"
            (home / name).write_text(content)
    (home / "held_out.jsonl").write_text('{"question": "What is 6 plus 9?", "answer": "15"}\n')  # a reader's own
    return home


@pytest.fixture(autouse=True)
def in_folder(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))  # to which the command line adds the folder
        patch.setenv("CPPO_VLLM_API_KEY", "secret")
        yield


def run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints; the package's own commands run here, which spares each the time to import torch."""
    if MODULE not in command:
        program, *words = shlex.split(command)
        assert program == "python"
        return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=True).stdout
    if "--print_config" in command:
        return yaml.safe_dump(resolved([word for word in arguments(command) if word != "--print_config"], capsys))
    main(arguments(command))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def done() -> dict[str, list[str]]:
    """What the commands of each page have printed."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(PAGES_TO_RUN))
def test_commands_run(page: str, folder: Path, done: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    if page == "howto/evaluate.md" and "howto/resume_and_export.md" not in done:
        run(COMMANDS["howto/resume_and_export.md"][0], folder, capsys)  # whose checkpoint it evaluates
    commands = [command for command in COMMANDS[page] if not is_parsed(command)]
    assert commands
    done[page] = [run(command, folder, capsys) for command in commands]
    if page == "howto/resume_and_export.md":
        assert "rollout 4/4" in done[page][1]
        assert (folder / "exported" / "model.safetensors").is_file()
    if page == "howto/evaluate.md":
        steps = [re.findall(r"Evaluation at step (\d+), 4 samples", printed) for printed in done[page]]
        assert steps[0] == ["0"]
        assert int(steps[1][0]) > 0
        assert list(folder.glob("runs/debug/*/evaluations/sums/step=0.parquet"))
    if page == "howto/own_model.md":
        assert "evaluation at step 0 | eval/held_out/avg@8" in done[page][0]
        assert list(folder.glob("runs/mine/version_0/checkpoints/last.ckpt"))
    if page == "howto/compare_runs.md":
        lines = done[page][-1].splitlines()
        firsts = [re.search(r"^runs/(\w+)/.*: rollout/reward first (\S+),.* mean of 3 ", line) for line in lines]
        assert [found and found[1] for found in firsts] == ["cppo", "grpo"]
        # with equal seeds both begin with the same samples
        assert len({found[2] for found in firsts if found}) == 1
    if page == "howto/dry_run.md":
        sections = re.findall(r"^- \*\*([\w ]+)\*\*", PAGES[page], re.MULTILINE)
        assert len(sections) == 5
        lines = [line.strip().lower() for line in done[page][0].splitlines()]
        titles = [title.lower().removeprefix("the ") for title in sections]
        assert [title for title in titles if not any(line.startswith(title) for line in lines)] == []
        assert "dry run: nothing was trained" in done[page][0]


def test_every_command_is_run_or_parsed() -> None:
    """No page with commands is left out, and no exception is left over."""
    with_commands = {page for page, commands in COMMANDS.items() if commands}
    assert with_commands == {*PAGES_TO_RUN, "cluster.md", "replay.md", "engines.md"}
    everything = [command for page, commands in COMMANDS.items() if page not in TESTED_ELSEWHERE for command in commands]
    assert [pattern for pattern in PARSED if not any(fnmatch(command, pattern) for command in everything)] == []
    assert all(is_parsed(command) for command in COMMANDS["cluster.md"])
    (check,) = [command for command in COMMANDS["cluster.md"] if "resume-check" in command]
    assert f"```sh\n{check}\n```" in README


@pytest.mark.parametrize(
    "command",
    [c for commands in COMMANDS.values() for c in commands if is_parsed(c) and arguments(c)[0] in ("fit", "validate")],
)
def test_commands_for_larger_machines_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(arguments(command), capsys)
    assert config["model"]["trust_region"]["class_path"].endswith(".CPPO")


def test_export_is_asked_as_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing has been exported
    (command,) = [c for c in COMMANDS["cluster.md"] if "export" in c]
    with pytest.raises(SystemExit) as end:
        main(arguments(command))
    assert end.value.code == 2
    # everything was understood, and the run is not there
    assert capsys.readouterr().err.startswith(f"error: checkpoint '{arguments(command)[1]}' ")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_is_read(page: str) -> None:
    """By a command of its page, by another file there, or by the test below."""
    blocks = blocks_of(PAGES[page])
    files = files_of(blocks)
    if page not in TESTED_ELSEWHERE:
        assert [block for block in blocks if block.language in ("yaml", "python", "jsonl") and block.file is None] == []
    for name, own in files.items():
        others = [*COMMANDS[page], *(text for text in files.values() if text is not own)]
        assert name in READ_AFTER or any(name.removesuffix(".py") in other for other in others), name


@pytest.mark.parametrize("file", READ_AFTER)
def test_files_without_a_command_parse(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(["fit", "--config", READ_AFTER[file], "--config", file], capsys)
    for section, values in yaml.safe_load((folder / file).read_text()).items():
        assert contains(config[section], values)


def test_the_command_that_starts_a_server_elsewhere() -> None:
    (command,) = COMMANDS["engines.md"]
    assert command == f"{how_to_serve('/models/Qwen3-1.7B-Base', 20)} --dtype bfloat16"


def test_the_ways_for_weights() -> None:
    table = PAGES["engines.md"].split("## How weights get there")[1]
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \|", table, re.MULTILINE)[1:] == list(WAYS)


def test_the_table_of_strategies() -> None:
    files = sorted(file.stem for file in (REPOSITORY / "configs" / "strategy").glob("*.yaml"))
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGES["cluster.md"].split("## Launchers")[0], re.MULTILINE)) == files


def test_the_order_of_imports_is_the_one_that_is_tested() -> None:
    order = PAGES["architecture.md"].split("holds it to that.")[1].split("\n\n")[1]
    assert [set(re.findall(r"`(\w+)`", names)) for names in order.split(">")] == list(ORDER[:-1])  # but for the package's own


def test_tags_are_those_of_the_dictionary() -> None:
    """Every tag that a page names in code is one that a run may log."""
    pattern = re.compile(r"`((?:rollout|train|mask|budget|trust_region|mismatch|canary|eval|data|samples)/[^`]+)`")
    named = {tag for page, text in PAGES.items() if page != "metrics.md" for tag in pattern.findall(text)}
    assert len(named) > 15
    assert {tag for tag in named if "*" not in tag and find(re.sub(r"<\w+>", "1", tag)) is None} == set()


def test_settings_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key that a page names in code is one of ``fit``."""
    keys = {key for text in PAGES.values() for key in re.findall(r"`((?:data|model)(?:\.\w+)+)", text)}
    assert len(keys) > 15
    config = resolved(["fit", "--config", "configs/debug.yaml", "--model.reference_kl.coef", "0.01"], capsys)
    assert {key for key in keys if not has(config, key.split("."))} == set()


def has(config: Any, key: list[str]) -> bool:
    if not key:
        return True
    settings = config.get("init_args", config) if isinstance(config, dict) else {}
    return key[0] in settings and has(settings[key[0]], key[1:])


def test_classes_are_there() -> None:
    """Every class that a page names in code is public somewhere."""
    pages = [text for page, text in PAGES.items() if page != "architecture.md"]
    named = {name for text in pages for name in re.findall(r"`([A-Z]\w*[a-z]\w*)`", text)}
    known = {name for module in PUBLIC for name in vars(import_module(f"cppo_lightning.{module}"))}
    others = {"ModelCheckpoint", "ValueError", "DriftCap"}  # Lightning's, Python's, and the reader's own
    assert named - known == others


def test_what_a_config_evaluates_is_not_what_it_is_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Both traps of howto/own_model.md: an evaluation of its own, and keys that stay when the class changes."""
    config = resolved(["fit", "--config", "configs/quickstart.yaml", "--config", "mine.yaml"], capsys)
    named = [callback.get("init_args", {}).get("datasets", {}) for callback in config["trainer"]["callbacks"]]
    sums = config["data"]["evaluation"]["prompts"]
    assert [sums] == [sets["heldout_sums"] for sets in named if "heldout_sums" in sets]
    path = ["--data.prompts", "cppo_lightning.rollout.DatasetPrompts", "--data.prompts.init_args.path", "problems.jsonl"]
    kept = resolved(["fit", "--config", "configs/quickstart.yaml", *path], capsys)["data"]["prompts"]["init_args"]
    assert (kept["name"], kept["split"]) == ("basic_arithmetic", "train")
    assert (config["data"]["prompts"]["init_args"]["name"], sums["init_args"]["split"]) == (None, "heldout")


ANSWERS = {
    "data.plan.prompts = 5": ["--data.plan.prompts", "5"],
    "data.sampling is truncated": ["--data.sampling.top_p", "0.9"],
}


@pytest.mark.parametrize("message", ANSWERS)
def test_messages_are_those_of_the_program(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(rf"^\| `(error: {re.escape(message)}.*?)(?: \.\.\.)?` \|", PAGES["troubleshooting.md"], re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/debug.yaml", *ANSWERS[message]])
    assert capsys.readouterr().err.splitlines()[-1].startswith(shown)


def test_the_message_before_make_debug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(REPOSITORY / "configs" / "debug.yaml")])
    shown = "error: model.policy.path 'models/tiny' "
    assert capsys.readouterr().err.splitlines()[-1].startswith(shown)
    assert f"| `{shown}...` |" in PAGES["troubleshooting.md"]


# a pool that has never checked a problem by its deadline
LATE: Any = SimpleNamespace(
    verifier=MathAnswer(), deadline=1.0, check=lambda some: [Verdict(Outcome.TIMED_OUT, 0.0) for _ in some]
)


@pytest.mark.parametrize(
    ("words", "refuse"),
    [
        ("VerifierPool", lambda: check_problems([Problem("p", (), "1")], LATE)),
        ("on rank", lambda: check_same_on_ranks(["a", "b"])),
    ],
)
def test_messages_that_need_time_or_ranks_are_those_of_the_program(words: str, refuse: Callable[[], Any]) -> None:
    (shown,) = re.findall(rf"^\| `error: ([^`]*{words}[^`]*)` \|", PAGES["troubleshooting.md"], re.MULTILINE)
    with pytest.raises(ConfigError, match=".*".join(map(re.escape, shown.split("...")))):
        refuse()


def test_the_sites_start_is_readme() -> None:
    """And not a copy of it, which would stay as it was."""
    assert (DOCS / "readme.md").resolve() == REPOSITORY / "README.md"


def test_links_lead_somewhere() -> None:
    """On a disk, where a site's own checks do not look; and not through the linked folders, which only the site follows."""
    broken = []
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text):
            there = Path(os.path.normpath((DOCS / page).parent / target))
            if not there.exists() or there == DOCS / "readme.md" or DOCS / "notebooks" in there.parents:
                broken.append((page, target))
    assert broken == []


@pytest.mark.slow
def test_pages_make_a_site(tmp_path: Path) -> None:
    """Without a warning; what is stored in a notebook is shown, and the reference has every trust region with its arguments."""
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html", DOCS, tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    site = tmp_path / "site"
    by_hand = (site / "notebooks" / "trust_regions_by_hand.html").read_text()
    assert "data:image/png;base64" in by_hand
    assert "decisions as by hand: True" in by_hand
    reference = (site / "reference" / "trust_regions.html").read_text()
    regions = import_module("cppo_lightning.trust_regions").__all__
    assert [name for name in regions if not re.search(rf'id="cppo_lightning\.[\w.]*{name}"', reference)] == []
    assert "budget per unit of position weight" in reference
