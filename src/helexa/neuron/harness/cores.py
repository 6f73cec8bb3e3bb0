"""How many threads an engine may use on this machine, and what its processors can."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

MAX_THREADS: Final = 512  # GGML_MAX_N_THREADS


def default_threads() -> int:
    """One core is left to the rest of the machine where there are more than two: with all of them taken, anything
    else that runs makes the engine's threads wait for each other (75 tok/s became 5)."""
    cores = usable_cores()
    return cores - 1 if cores > 2 else cores


def usable_cores() -> int:
    """Physical cores that this process may use: hyper-threads, affinity and a container's quota counted."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, psutil.cpu_count(logical=False) or cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, min(cores, MAX_THREADS))


def cpu_flags() -> frozenset[str]:
    """What the processor says it can (x86: avx2, avx512_bf16 ...); nothing where nobody tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
