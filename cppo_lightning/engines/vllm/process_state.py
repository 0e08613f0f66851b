"""What vLLM changes for the whole process in which it runs, and how it is put back.  Imports no vllm."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_environment() -> None:
    """Environment variables that vLLM reads when it is imported and started in the trainer's process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights and random state are handed over in process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # binding would pin the trainer's threads as well, and those of every rank to the same cores
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back what vLLM changes for the whole process: random states, threads, the current GPU, children's environment."""
    import numpy as np

    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    environment = {key: os.environ.get(key) for key in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for device in devices:
            torch.cuda.set_device(device)
        for key, value in environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
