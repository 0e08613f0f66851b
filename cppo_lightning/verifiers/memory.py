"""The memory limit of a worker, and knowing that it was reached whatever the verifier makes of it.

Libraries turn a failed allocation into "not equal": math-verify and SymPy catch every ``Exception`` in many places.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path


class MemoryLimitReached(BaseException):
    """Raised by the interpreter instead of ``MemoryError`` after :func:`watch`: no ``except Exception`` stops it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _note()


_reached = False


def _note() -> None:
    global _reached
    _reached = True


def reached() -> bool:
    """Whether an allocation has failed since the last call; needs :func:`watch`."""
    global _reached
    was, _reached = _reached, False
    return was


def limit(megabytes: int) -> None:
    """Let allocations that bring this process's address space above so many MiB fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = megabytes << 20 if hard == resource.RLIM_INFINITY else min(megabytes << 20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ValueError, OSError) as error:  # macOS refuses this limit
        print(f"verifier worker {os.getpid()}: no memory limit on this platform ({error})", file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def taken() -> int:
    """This process's address space in MiB; 0 where the platform does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() >> 20 if statm.exists() else 0


def watch() -> None:
    """Have failed allocations noted from now on."""
    if sys.implementation.name != "cpython":
        return
    if sys.version_info >= (3, 12):
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.PROFILER_ID, __name__)
        monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.RAISE, _raised)
        monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.RAISE)
    else:
        # Python 3.11 tells nobody of an exception that is caught again, but looks up what to raise in this variable.
        ctypes.c_void_p.in_dll(ctypes.pythonapi, "PyExc_MemoryError").value = id(MemoryLimitReached)


def _raised(code: object, offset: int, error: BaseException) -> None:
    if isinstance(error, MemoryError):
        _note()
