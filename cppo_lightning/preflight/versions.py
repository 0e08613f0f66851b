"""Which versions run, and combinations of them and of settings that are known to go wrong."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from cppo_lightning.engines.vllm.settings import check_version, installed_version
from cppo_lightning.errors import ConfigError
from cppo_lightning.preflight.section import Row, Section, plural

_PACKAGES = (
    "cppo-lightning", "lightning", "transformers", "tokenizers", "peft", "datasets", "jsonargparse", "torchmetrics",
    "reasoning-gym", "math-verify", "flash-attn", "torchvision", "torchaudio",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What known trouble depends on.

    Args:
        versions: by name, of what is installed.
        cuda: whether torch is a build with CUDA.
        on_cpu: whether ranks compute on the CPU.
        ranks_here: ranks on one machine.
        threads: of torch, of each rank.
        cores: of this machine, that this process may use.
        engine_dtype: that it samples in; None where it does not say.
        compute: dtype that the trainer computes in.
        budget: the trust region's ``delta_b``; None where it has none.
        servers_elsewhere: whether servers were started by hand.
    """

    versions: dict[str, str]
    cuda: bool
    on_cpu: bool
    ranks_here: int
    threads: int
    cores: int
    engine_dtype: str | None
    compute: str
    budget: float | None
    servers_elsewhere: bool


def _untested_vllm(setup: Setup) -> str | None:
    if "vllm" not in setup.versions:
        return None
    try:
        check_version(setup.versions["vllm"], "VLLMEngine")
    except ConfigError as refused:
        return str(refused)
    return None


def _other_build(setup: Setup) -> str | None:
    odd = [name for name in ("torchvision", "torchaudio") if "+cpu" not in setup.versions.get(name, "+cpu")]
    if setup.cuda or not odd:
        return None
    return (
        f"{' and '.join(odd)} may be a CUDA build beside torch's CPU build, which breaks transformers (operator "
        "torchvision::nms does not exist): uninstall it, text models need none of it"
    )


def _engine_dtype(setup: Setup) -> str | None:
    if setup.engine_dtype in (None, setup.compute, "float32") or setup.budget is None or setup.budget > 0.05:
        return None
    return (
        f"the engine samples in {setup.engine_dtype} and the trainer computes in {setup.compute}, which alone moves "
        f"log-probabilities by some 0.04 nats and spends most of a prefix budget like delta_b = {setup.budget:g}; let both "
        f"have one dtype, raise delta_b, or set CPPO.noise, and look at mismatch/budget_spent_mean"
    )


def _chunked_prefill(setup: Setup) -> str | None:
    if not (setup.on_cpu and setup.servers_elsewhere):
        return None
    return "servers on a CPU need --no-enable-chunked-prefill: with it vLLM does not keep to the seed of a request"


def _too_many_threads(setup: Setup) -> str | None:
    wanted = setup.ranks_here * setup.threads
    if not setup.on_cpu or wanted <= setup.cores:
        return None
    return (
        f"{setup.ranks_here} ranks of {setup.threads} threads share {setup.cores} cores, and OpenMP threads that wait for each "
        f"other's cores are ten times slower: set OMP_NUM_THREADS={max(1, setup.cores // setup.ranks_here)}"
    )


KNOWN_TROUBLE: tuple[Callable[[Setup], str | None], ...] = (
    _untested_vllm, _other_build, _engine_dtype, _chunked_prefill, _too_many_threads,
)  # fmt: skip


def installed() -> dict[str, str]:
    """Version by name of the packages that matter to a run, of those that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | ({"vllm": installed_version()} if find_spec("vllm") is not None else {})


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def versions_section(setup: Setup) -> Section:
    build = "built with CUDA" if setup.cuda else "built for the CPU"
    notes = {"torch": f"{build}, {plural(setup.threads, 'thread')} on {plural(setup.cores, 'core')}"}
    rows: list[Row] = [(name, found, notes.get(name, "")) for name, found in setup.versions.items()]
    warnings = [trouble for find in KNOWN_TROUBLE if (trouble := find(setup)) is not None]
    return Section("Versions", rows, warnings)
