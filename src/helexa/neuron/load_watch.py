"""How far a load is, told from outside: an engine may hold its interpreter for as long as it loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from helexa.neuron import vitals

LOOK_S: Final = 0.25  # between two looks
STUCK_S: Final = 120.0  # a load in which nothing is read and no processor time passes
BUSY_STUCK_S: Final = 1200.0  # ... in which nothing is read but the processor works: kernels are compiled for minutes
IDLE_CPU: Final = 0.015  # of one core; measured: an idle llama.cpp server takes one tick of 10 ms in 15 s


class LoadWatch:
    """Bytes that its processes read or mapped, of the size of its files; None where nobody can tell."""

    def __init__(self, pids: Callable[[], Sequence[int]], size_bytes: int) -> None:
        """pids: of the host and what it started to load with it, as they are now."""
        self._pids = pids
        self._size = max(size_bytes, 1)
        self._read_at_start, self._memory_at_start, _ = self._sums()
        self._cpu_s = 0.0
        self._mark = -1.0
        self._moved_at = self._busy_at = time.monotonic()
        self.fraction: float | None = None

    def look(self, told: float | None) -> None:
        """told: the engine's own fraction, where it reports one."""
        now = time.monotonic()
        read, memory, cpu_s = self._sums()
        moved = max(read - self._read_at_start, memory - self._memory_at_start, 0)
        seen = min(moved / self._size, 0.99)  # 1 is for the engine to say
        self.fraction = max(self.fraction or 0.0, seen if told is None else told)
        if moved + (told or 0.0) != self._mark:
            self._mark = moved + (told or 0.0)
            self._moved_at = now
        if cpu_s - self._cpu_s > IDLE_CPU * LOOK_S:
            self._busy_at = now
        self._cpu_s = cpu_s

    def _sums(self) -> tuple[int, int, float]:
        """Bytes read, bytes resident, seconds of processor time."""
        pids = self._pids()
        memories = [memory.total for pid in pids if (memory := vitals.memory(pid)) is not None]
        read = sum(vitals.bytes_read(pid) or 0 for pid in pids)
        return read, sum(memories), sum(vitals.cpu_s(pid) or 0.0 for pid in pids)

    def why_stuck(self) -> str | None:
        now = time.monotonic()
        if now - max(self._moved_at, self._busy_at) > STUCK_S:
            return f"the load stood still for {STUCK_S:.0f} s: nothing read, no processor time used"
        if now - self._moved_at > BUSY_STUCK_S:
            return f"the load read nothing for {BUSY_STUCK_S:.0f} s although it was busy"
        return None
