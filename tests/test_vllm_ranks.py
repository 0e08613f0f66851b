"""VLLMEngine with each rank's own engine in its process: two ranks against one, what is refused, and memory lent in between."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from cppo_lightning.engines.checksums import checksums
from cppo_lightning.engines.engine import Completion
from cppo_lightning.engines.vllm import settings as vllm_settings
from cppo_lightning.engines.vllm.engine import VLLMEngine
from cppo_lightning.engines.vllm.lent_memory import LentMemory
from cppo_lightning.errors import ConfigError
from cppo_lightning.policy import Policy, PolicyConfig
from cppo_lightning.rollout import Sampling

PROMPTS = [[[5, 6, 7], [9, 8]], [[30, 40, 50, 60]]]  # by rank


def launched_by_torchrun(rank: int, port: int) -> dict[str, str]:
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **local}


def moved(model: str) -> Policy:
    """The policy with other weights than the folder's."""
    policy = Policy.load(PolicyConfig(model))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    return policy


def drawn(engine: VLLMEngine, rank: int) -> list[dict[str, Any]]:
    """What ``engine`` samples to a rank's prompts with that rank's seed."""
    return [vars(c) for c in engine.generate(PROMPTS[rank], 3, Sampling(max_tokens=12), top_logprobs=4, seed=rank)]


def assert_equal(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one["finished"] == other["finished"]
        for name in ("ids", "logp", "topk_ids", "topk_logp"):
            assert torch.equal(one[name], other[name]), name


def assert_alone(engine: VLLMEngine) -> None:
    """vLLM takes its engine for the only one there is."""
    parallel = engine._loaded().llm_engine.vllm_config.parallel_config
    assert (parallel.world_size, parallel.data_parallel_size, parallel.rank) == (1, 1, 0)


def reduced() -> float:
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return float(total)


def assert_lends_its_memory(engine: VLLMEngine, policy: Policy) -> None:
    """Through vLLM's scheduler, which sleep stops; a CPU's memory stays where it is."""
    llm, calls = engine._loaded(), list[Any]()

    class Recorded:
        def sleep(self, level: int = 1) -> None:
            calls.append(f"sleep {level}")
            llm.sleep(level)

        def wake_up(self, tags: list[str] | None = None) -> None:
            calls.append(tags)
            llm.wake_up(tags)

    engine._memory = LentMemory(Recorded())
    first = drawn(engine, 1)
    assert llm.llm_engine.is_sleeping()
    engine.load_weights(policy.named_weights(), 5)
    second, third = drawn(engine, 1), drawn(engine, 1)
    assert calls == ["sleep 1", ["weights"], ["kv_cache"], "sleep 1", ["kv_cache", "weights"], "sleep 1"]
    assert_equal(second, first)
    assert_equal(third, first)

    def stop(place: int, completion: Completion) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.generate(PROMPTS[1], 3, Sampling(max_tokens=12), seed=1, on_completion=stop)
    assert calls[-1] == "sleep 1"


def _rank(rank: int, port: int, model: str, folder: str) -> None:
    """One of two ranks of a trainer with FSDP2."""
    os.environ |= launched_by_torchrun(rank, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    policy = moved(model)
    expected = checksums(policy.named_weights(), torch.float32)
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    engine = VLLMEngine(max_model_len=256)
    assert engine.checksums() is None
    engine.start(model)
    engine.load_weights(policy.named_weights(), 4)
    assert engine.checksums() == expected
    found = drawn(engine, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    assert_alone(engine)
    assert launched_by_torchrun(rank, port).items() <= os.environ.items()
    assert reduced() == 2
    engine.close()
    assert reduced() == 2
    # and another run in the same process, with a new group
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine.start(model)
    engine.load_weights(moved(model).named_weights(), 0)
    assert_equal(drawn(engine, rank), found)
    engine.close()
    assert reduced() == 2
    torch.distributed.destroy_process_group()


@pytest.mark.vllm
@pytest.mark.slow
def test_two_ranks_sample_what_one_process_samples_and_their_group_lives_on(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = (port, str(tiny_model_path), str(tmp_path))
    ranks = cast(Any, torch).multiprocessing.spawn(_rank, arguments, nprocs=2, join=False)
    # this process was started by torchrun, as far as it can see, but has no group
    for name, value in launched_by_torchrun(1, port + 1).items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine, policy = VLLMEngine(max_model_len=256), moved(str(tiny_model_path))
    try:
        engine.start(str(tiny_model_path))
        assert_alone(engine)
        engine.load_weights(policy.named_weights(), 4)
        alone = [drawn(engine, rank) for rank in (0, 1)]
        assert_lends_its_memory(engine, policy)
        while not ranks.join():
            pass
    finally:
        engine.close()
        torch.set_num_threads(threads)
    assert not torch.distributed.is_initialized()
    for rank in (0, 1):
        assert len(alone[rank]) == 3 * len(PROMPTS[rank])
        assert_equal(alone[rank], torch.load(tmp_path / f"{rank}.pt"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have it look as if a version of vLLM were installed."""
    monkeypatch.delenv(vllm_settings.ANY_VERSION, raising=False)
    monkeypatch.setattr(vllm_settings.importlib.util, "find_spec", lambda name: object())
    return lambda version: monkeypatch.setattr(vllm_settings, "installed_version", lambda: version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.1.dev4+gabc.cpu"])
def test_versions_that_were_tested_pass(installed: Callable[[str], None], version: str, recwarn: Any) -> None:
    installed(version)
    VLLMEngine()
    assert not recwarn


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.33.0rc1", "1.0.0", "0.9.2", "of an unknown version"])
def test_other_versions_are_refused_unless_asked_for(
    installed: Callable[[str], None], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(version)
    message = rf"vLLM {version} is installed, and engine VLLMEngine was tested with >=0\.32,<0\.33"
    with pytest.raises(ConfigError, match=message + r"; install one of those .* or set CPPO_ANY_VLLM=1"):
        VLLMEngine()
    monkeypatch.setenv("CPPO_ANY_VLLM", "1")
    with pytest.warns(UserWarning, match=message):
        VLLMEngine()


def test_the_packages_extra_allows_the_versions_that_were_tested() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (first, after) = vllm_settings.TESTED
    assert "vllm>={}.{},<{}.{}".format(*first, *after) in project["optional-dependencies"]["vllm"]


@pytest.mark.vllm
def test_the_installed_version_is_found() -> None:
    import vllm

    assert vllm_settings.installed_version() == cast(Any, vllm).__version__.split("+")[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", 2, r"tensor_parallel_size must be 1 for VLLMEngine.* got 2; take .*VLLMServerEngine"),
        ("pipeline_parallel_size", 2, r"pipeline_parallel_size must be 1"),
        ("data_parallel_size", 4, r"data_parallel_size must be 1"),
        ("nnodes", 2, r"nnodes must be 1"),
        ("distributed_executor_backend", "external_launcher", r"distributed_executor_backend is set by the engine"),
        ("enable_sleep_mode", True, r"enable_sleep_mode is set by the engine; use engine\.sleep"),
    ],
)
def test_one_engine_lives_in_one_process(installed: Callable[[str], None], name: str, value: object, message: str) -> None:
    installed("0.32.0")
    with pytest.raises(ConfigError, match=message):
        VLLMEngine(engine_args={name: value})
    if name.endswith("_size"):
        VLLMEngine(engine_args={name: 1})


@pytest.mark.vllm
@pytest.mark.slow
def test_a_cpu_keeps_its_memory(tiny_model_path: Path) -> None:
    """vLLM refuses sleep mode there, so that ``sleep: true``, the default, must not ask for it."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(model=str(tiny_model_path), enable_sleep_mode=True).create_engine_config()
