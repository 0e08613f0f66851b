"""What docs/engines.md and docs/cluster.md tell a reader to type is what the code wants."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cppo_lightning.cli import main
from cppo_lightning.engines.vllm_server.process import how_to_serve
from cppo_lightning.engines.vllm_server.weight_transfer import WAYS

REPOSITORY = Path(__file__).parents[1]
ENGINES = (REPOSITORY / "docs" / "engines.md").read_text()
CLUSTER = (REPOSITORY / "docs" / "cluster.md").read_text().replace("\\\n", " ")
MODULE = "-m cppo_lightning "
COMMANDS = re.findall(rf"^.*{MODULE}.*$", CLUSTER, re.MULTILINE)


def test_the_command_that_starts_a_server_elsewhere() -> None:
    (command,) = re.findall(r"^VLLM_API_KEY=.*$", ENGINES, re.MULTILINE)
    assert command == f"{how_to_serve('/models/Qwen3-1.7B-Base', 20)} --dtype bfloat16"


def test_the_engine_that_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```yaml\n(# elsewhere\.yaml\n.*?)```", ENGINES, re.DOTALL)
    (tmp_path / "elsewhere.yaml").write_text(text)
    monkeypatch.setenv("CPPO_VLLM_API_KEY", "secret")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", f"{REPOSITORY}/configs/base.yaml", f"--config={tmp_path}/elsewhere.yaml", "--print_config"])
    captured = capsys.readouterr()
    assert end.value.code in (0, None), captured.err
    found = yaml.safe_load(captured.out)["data"]["engine"]["init_args"]
    wanted = yaml.safe_load(text)["data"]["engine"]["init_args"]
    assert {name: found[name] for name in wanted} == wanted


def test_the_ways_for_weights() -> None:
    table = ENGINES.split("## How weights get there")[1]
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \|", table, re.MULTILINE)[1:] == list(WAYS)


def test_cluster_has_commands() -> None:
    assert [command.split(MODULE)[1].split()[0] for command in COMMANDS] == ["fit"] * 4 + ["resume-check", "export"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if f"{MODULE}fit" in command])
def test_a_fit_on_a_cluster_parses(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command.split(MODULE)[1]), "--print_config"])
    assert end.value.code in (0, None), capsys.readouterr().err


def test_the_table_of_strategies() -> None:
    files = sorted(file.stem for file in (REPOSITORY / "configs" / "strategy").glob("*.yaml"))
    assert sorted(re.findall(r"^\| `(\w+)` \|", CLUSTER.split("## Launchers")[0], re.MULTILINE)) == files
