"""The watchdog over an engine's steps: the host writes what it does into shared memory, the daemon looks once a second.

For a harness whose engine can stand still with nobody inside to notice: a thread that is stuck in a collective or in a
driver's call. A harness asks for it by making the report beside its socket (`StepReport.create(report_of(socket))`)
when it loads; where there is none, nothing is watched.

One page of 8-byte words: version, step, phase, since (ns of the system's monotonic clock), usual (us; 0: unknown),
number of ranks, their process ids. One writer. A step is judged overdue when two looks in a row find it so: a look
may fall between two writes.
"""

from __future__ import annotations

import enum
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

VERSION: Final = 1
PAGE: Final = 4096
RANKS: Final = 6  # the first word of the ranks' process ids

LEAST_S: Final = 30.0
TIMES: Final = 20  # so often the usual time of a step of its shape
FIRST_S: Final = 1200.0  # kernels are compiled and weights touched for the first time; as long as a load may be busy


class Phase(enum.IntEnum):
    IDLE = 0
    FIRST = 1  # the engine's first step
    CAPTURE = 2  # of a CUDA graph
    STEP = 3


def report_of(socket: Path) -> Path:
    """Where the host that answers on this socket reports."""
    return socket.with_suffix(".steps")


def allowed_s(phase: Phase, usual_s: float) -> float | None:
    """How long it may take; None: as long as it wants to."""
    if phase is Phase.IDLE:
        return None
    if phase is Phase.STEP:
        return max(LEAST_S, TIMES * usual_s)
    return FIRST_S


class StepReport:
    """The host's side. Owned by the thread that steps."""

    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, PAGE)).cast("q")
        self._step = 0

    @classmethod
    def create(cls, path: Path) -> StepReport:
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, PAGE)
            report = cls(fd)
        finally:
            os.close(fd)
        report._words[0] = VERSION
        return report

    def ranks(self, pids: Sequence[int]) -> None:
        """Processes of this host's that end with it."""
        most = PAGE // 8 - RANKS
        for at, pid in enumerate(pids[:most]):
            self._words[RANKS + at] = pid
        self._words[RANKS - 1] = min(len(pids), most)

    def begin(self, usual_s: float = 0.0, phase: Phase = Phase.STEP) -> None:
        """HOT, once a step: five writes to memory."""
        words = self._words
        self._step += 1
        words[3] = time.monotonic_ns()
        words[4] = int(usual_s * 1e6)
        words[1] = self._step
        words[2] = phase  # the last: until now it was idle

    def end(self) -> None:
        self._words[2] = Phase.IDLE


class StepWatch:
    """The daemon's side."""

    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)).cast("q")
        self._suspect = 0  # a step that was overdue at the last look

    @classmethod
    def open(cls, path: Path) -> StepWatch | None:
        """None where there is no report, or none yet."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            watch = cls(fd) if os.fstat(fd).st_size >= PAGE else None
        finally:
            os.close(fd)
        return watch if watch is not None and watch._words[0] == VERSION else None

    def why_stuck(self, now_ns: int | None = None) -> str | None:
        """Called once a second. The reason, when a step takes longer than it may."""
        words = self._words
        step, phase, since, usual_s = words[1], Phase(words[2]), words[3], words[4] / 1e6
        allowed = allowed_s(phase, usual_s)
        took_s = ((time.monotonic_ns() if now_ns is None else now_ns) - since) / 1e9
        if allowed is None or took_s <= allowed:
            self._suspect = 0
            return None
        if step != self._suspect:
            self._suspect = step
            return None
        usual = f" (usually {usual_s:.3g} s)" if usual_s else ""
        return f"step {step} has run for {took_s:.0f} s{usual}, longer than the {allowed:.0f} s it may take"

    def ranks(self) -> list[int]:
        return [self._words[RANKS + at] for at in range(self._words[RANKS - 1])]
