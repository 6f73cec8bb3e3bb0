"""A process that outlives nobody: what every child of the daemon does first, and what it does with its stdout."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1
OOM_SCORE: Final = "500"  # when memory runs out, a model goes before the daemon does


def die_with(parent: int | None) -> None:
    """Let the kernel end this process when the daemon's spawning thread ends; where it ended already, end now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        try:
            with open("/proc/self/oom_score_adj", "w") as score:
                score.write(OOM_SCORE)
        except OSError:
            pass  # a container may forbid it
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def take_stdout() -> int:
    """stdout is for frames alone: a descriptor to write them to. What a library prints goes to stderr from here on."""
    sys.stdout.flush()
    frames = os.dup(1)
    os.dup2(2, 1)
    return frames
