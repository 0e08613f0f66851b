"""Who may import whom, read from the source (imports under TYPE_CHECKING and inside functions count too)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOT = "cppo_lightning"

# A module imports from columns to its left only, or from its own package.
ORDER = (
    {"errors", "interrupts", "estimators", "replacing"},
    {"batch", "untrusted", "ranks", "rank_watch", "resume", "figures", "metric_dictionary", "onednn"},
    {
        "divergences",
        "observers",
        "sequences",
        "advantages",
        "losses",
        "logprobs",
        "lora",
        "model_card",
        "theory",
        "small_models",
    },
    {"policy_config"},
    {"trust_regions", "verifiers", "policy", "metrics"},
    {"mismatch", "strategies", "positions", "history"},
    {"prompts"},
    {"engines"},
    {"rollout"},
    {"module", "datamodule"},
    {"replay"},
    {"callbacks", "chain_model", "export", "resume_traces"},
    {"resume_check", "parser", "preflight"},
    {"cli"},
    {"__main__", "__init__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def sources() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package and the callbacks."""
    found = {}
    for folder, prefix in ((REPOSITORY / ROOT, ROOT), (REPOSITORY / "callbacks", f"{ROOT}.callbacks")):
        for file in sorted(folder.rglob("*.py")):
            parts = [prefix, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts)] = file
    return found


def imports(name: str, file: Path) -> Iterator[tuple[str, bool]]:
    """Each dotted name that the module imports, and whether this happens when the module itself is imported."""
    tree = ast.parse(file.read_text(), filename=str(file))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*name.split(".")[: -node.level], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", id(node) not in lazy) for alias in node.names)


def unit(dotted: str) -> str:
    """What lies under the root: ``cppo_lightning.engines.engine`` -> ``rollout``, ``cppo_lightning.Name`` -> ``__init__``."""
    second = dotted.split(".")[1] if "." in dotted else "__init__"
    return second if second in RANK or (REPOSITORY / ROOT / f"{second}.py").exists() else "__init__"


def in_unit(dotted: str, modules: set[str]) -> bool:
    """Whether ``dotted`` is one of ``modules`` or a name in one."""
    return dotted in modules or dotted.rpartition(".")[0] in modules


def violations(modules: dict[str, Path]) -> list[str]:
    wrong = []
    for name, file in modules.items():
        for imported, _ in imports(name, file):
            here, there = unit(name), unit(imported)
            if imported.split(".")[0] == ROOT and here != there and RANK[there] >= RANK[here]:
                wrong.append(f"{name} imports {imported}")
            if imported.split(".")[0] == "callbacks":
                wrong.append(f"{name} imports {imported}: the package is {ROOT}.callbacks")
    return wrong


def test_every_module_has_a_place() -> None:
    assert {unit(name) for name in sources()} <= set(RANK), "give the new module a column in ORDER"


def test_imports_point_to_the_left() -> None:
    assert violations(sources()) == []


def test_nothing_but_the_command_line_imports_the_callbacks() -> None:
    users = [
        name
        for name, file in sources().items()
        if unit(name) not in ("callbacks", "cli") and any(unit(imported) == "callbacks" for imported, _ in imports(name, file))
    ]
    assert users == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from cppo_lightning.datamodule import RolloutDataModule", True),
        ("import cppo_lightning.cli", True),
        ("def f():\n    from cppo_lightning import callbacks", True),
        ("from .. import cli", True),
        ("from cppo_lightning import RolloutBatch", True),
        ("from callbacks import MaskRate", True),
        ("from cppo_lightning.batch import TokenStats", False),
        ("from . import other", False),
        ("from cppo_lightning.errors import ConfigError", False),
        ("import torch", False),
    ],
)
def test_the_rule_sees_what_is_wrong(tmp_path: Path, line: str, expected: bool) -> None:
    file = tmp_path / "mine.py"
    file.write_text(line)
    assert bool(violations({f"{ROOT}.trust_regions.mine": file})) is expected


def test_vllm_is_imported_lazily_in_its_own_files() -> None:
    """What runs inside a vLLM server, or is one end of a transfer, may import it at once; nothing else loads those."""
    found = [(name, *used) for name, file in sources().items() for used in imports(name, file)]
    users = {(name, at_once) for name, imported, at_once in found if imported.split(".")[0] == "vllm"}
    server = f"{ROOT}.engines.vllm_server"
    assert {name for name, _ in users if not name.startswith((f"{ROOT}.engines.vllm.", f"{server}."))} == set()
    inside = {f"{server}.{name}" for name in ("guard", "route", "worker", "transfer_backends", "transfer_trainer")}
    assert {name for name, at_once in users if at_once} <= inside
    assert {name for name, imported, at_once in found if at_once and in_unit(imported, inside)} <= inside


def test_the_root_and_the_verifiers_do_without_torch() -> None:
    """Verifiers run in small child processes, which start in a fraction of the time that torch takes."""
    names = [name.removesuffix(".__init__") for name in sources() if unit(name) in ("verifiers", "errors")]
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nsys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, *names], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or "torch was imported"
