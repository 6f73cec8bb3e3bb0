"""How far a load is, told from outside: an engine may hold its interpreter for as long as it loads."""

from __future__ import annotations

import time
from typing import Final

from helexa.neuron import vitals

LOOK_S: Final = 0.25  # between two looks
STUCK_S: Final = 120.0  # a load in which nothing is read and no processor time passes
BUSY_STUCK_S: Final = 1200.0  # ... in which nothing is read but the processor works: kernels are compiled for minutes
IDLE_CPU: Final = 0.015  # of one core; measured: an idle llama.cpp server takes one tick of 10 ms in 15 s


class LoadWatch:
    """Bytes that the process read or mapped, of the size of its files; None where nobody can tell."""

    def __init__(self, pid: int, size_bytes: int) -> None:
        self._pid = pid
        self._size = max(size_bytes, 1)
        self._read_at_start = vitals.bytes_read(pid) or 0
        memory = vitals.memory(pid)
        self._memory_at_start = 0 if memory is None else memory.total
        self._cpu_s = 0.0
        self._mark = -1.0
        self._moved_at = self._busy_at = time.monotonic()
        self.fraction: float | None = None

    def look(self, told: float | None) -> None:
        """told: the engine's own fraction, where it reports one."""
        now = time.monotonic()
        read = (vitals.bytes_read(self._pid) or 0) - self._read_at_start
        memory = vitals.memory(self._pid)
        mapped = 0 if memory is None else memory.total - self._memory_at_start
        moved = max(read, mapped, 0)
        seen = min(moved / self._size, 0.99)  # 1 is for the engine to say
        self.fraction = max(self.fraction or 0.0, seen if told is None else told)
        if moved + (told or 0.0) != self._mark:
            self._mark = moved + (told or 0.0)
            self._moved_at = now
        cpu_s = vitals.cpu_s(self._pid) or 0.0
        if cpu_s - self._cpu_s > IDLE_CPU * LOOK_S:
            self._busy_at = now
        self._cpu_s = cpu_s

    def why_stuck(self) -> str | None:
        now = time.monotonic()
        if now - max(self._moved_at, self._busy_at) > STUCK_S:
            return f"the load stood still for {STUCK_S:.0f} s: nothing read, no processor time used"
        if now - self._moved_at > BUSY_STUCK_S:
            return f"the load read nothing for {BUSY_STUCK_S:.0f} s although it was busy"
        return None
