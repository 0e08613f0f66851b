"""What the scripts of this folder measure with: the machine in words, calls in turns, most memory of a block, exponents."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CPU = torch.device("cpu")


def machine(device: torch.device = CPU) -> str:
    """:func:`setup`, and the load of the last minute."""
    return f"{setup(device)}, load {os.getloadavg()[0]:.1f}"


def setup(device: torch.device = CPU) -> str:
    """Processor or GPU, cores, and torch's threads and version, in one line."""
    threads = torch.get_num_threads()
    return f"{_processor(device)}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model} ({platform.machine()}, {os.cpu_count()} cores)"


def seconds(call: Callable[[], object], device: torch.device = CPU, repeats: int = 1) -> float:
    """Wall time of one call, mean over ``repeats``; a GPU's queue is empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: Iterable[object], device: torch.device = CPU, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call in each round.  Calls take turns, so that what else the machine does falls on all alike.

    Args:
        rounds: as many as wanted, for example ``track(range(8))``, which shows progress.
        repeats: calls that one figure is the mean of.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in rounds:
        for name, call in calls.items():
            taken[name].append(seconds(call, device, repeats))
    return taken


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(mine / its for mine, its in zip(own, other, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device = CPU) -> int:
    """Bytes that can still be had."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak_extra_memory(device: torch.device = CPU) -> Iterator[Peak]:
    """The most memory that the block holds at once beyond what was held before it; its results count, its arguments do not.

    On CUDA as torch's allocator counts it, on a CPU the process's resident set, so let a call run once before: what libraries
    set up at their first call is in it.

    Raises:
        OSError: the CPU's system is no Linux, or does not let a process reset its own peak.
    """
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    _give_freed_memory_back()  # else it would be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present VmRSS, see proc_pid_clear_refs(5)
    before = _status("VmRSS")
    yield peak
    peak.bytes = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _give_freed_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries give pages back themselves
    if trim is not None:
        trim(0)


def keep_freed_memory() -> bool:
    """Tell glibc to give no memory back; False where there is no glibc.

    Torch does so on a GPU.  Otherwise the kernel gives fresh pages to every tensor above a size, which costs more than the
    arithmetic on it, and only where tensors are large.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit ``values = a * sizes^b``; of two points, what a doubling says."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(v) for v in values]).slope
