"""The memory that there is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Bytes of memory here.

    Attributes:
        device: of the accelerator that one rank has, in all; None where ranks compute on the CPU.
        host: of the machine, or of the container that this process runs in.
        process: that this process, with its libraries, takes at the moment.
    """

    device: int | None
    host: int
    process: int

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Of this machine, where a rank computes on ``device``."""
        total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        page = os.sysconf("SC_PAGE_SIZE")
        host = min([os.sysconf("SC_PHYS_PAGES") * page, *_container_limit()])
        return cls(total, host, int(Path("/proc/self/statm").read_text().split()[1]) * page)


def _container_limit() -> list[int]:
    """The limit that cgroups (version 2, then 1) put on this process's container, if any does."""
    files = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]
