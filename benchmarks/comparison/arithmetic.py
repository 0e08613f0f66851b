"""The same floats on as many machines as settings can reach: one thread, and one set of instructions."""

from __future__ import annotations

import platform

# Sums depend on how many threads share them and on how wide a register is.  AVX2 is the widest that x86 machines of the last
# ten years have in common, and costs these small models nothing.  What MKL promises for other makes than Intel's is its mode
# COMPATIBLE alone, which takes twice as long.
_EVERYWHERE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_X86 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}


def settings() -> dict[str, str]:
    """The environment variables; they work before torch is imported only."""
    return _EVERYWHERE | (_X86 if platform.machine() in ("x86_64", "AMD64") else {})
