"""Standing still: a process, or single threads of one, stopped for a while."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import psutil
import pytest

_SEIZE: Final = 0x4206  # linux/ptrace.h
_INTERRUPT: Final = 0x4207
_DETACH: Final = 17
_WALL: Final = 0x40000000  # linux/wait.h: threads too

_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped_threads(tids: Iterable[int]) -> Iterator[None]:
    """As a debugger stops them: the other threads of the process go on. Skips the test where that is not allowed.
    To be left by the thread that entered it."""
    held: list[int] = []
    try:
        for tid in tids:
            if _ptrace(_SEIZE, tid) != 0:
                pytest.skip(f"this system does not let a test stop threads: {os.strerror(ctypes.get_errno())}")
            held.append(tid)
            _ptrace(_INTERRUPT, tid)
            os.waitpid(tid, _WALL)
        yield
    finally:
        for tid in held:
            _ptrace(_DETACH, tid)


def _ptrace(request: int, tid: int) -> int:
    return int(_libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), ctypes.c_void_p(), ctypes.c_void_p()))
