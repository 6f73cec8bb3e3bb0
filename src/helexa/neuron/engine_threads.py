"""The threads of engines that live in the daemon's own process, and whether they work. Linux; elsewhere nobody knows.

A thread belongs to the engine during whose load it appeared. One that appears later (a pool that is made with the
first step) cannot be told apart where there are several engines, and counts for each of them.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Final

from helexa.neuron import vitals

WORKERS: Final = ("asyncio_", "load ", "close ")  # names of threads that the daemon itself begins at any time


class Engines:
    """All engines of this process. Called from the daemon's loop."""

    def __init__(self) -> None:
        self._all: set[EngineThreads] = set()

    def begin(self) -> EngineThreads:
        """Before a load; `end` it when its engine is gone."""
        engine = EngineThreads(self)
        self._all.add(engine)
        return engine

    def of_others(self, engine: EngineThreads) -> set[int]:
        found = {tid for other in self._all if other is not engine for tid in other.own}
        return found - engine.own

    def ended(self, engine: EngineThreads) -> None:
        self._all.discard(engine)


class EngineThreads:
    """One engine's. own: those that appeared during its load."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._before = _tids()
        self._cpu_s: dict[int, float] = {}
        self.own: set[int] = set()

    def loaded(self) -> None:
        self.own = _tids() - self._before - _workers()

    def worked_s(self) -> float:
        """Processor time since the last call. A few tens of microseconds a thread."""
        mine = _tids() - self._before - _workers() - self._engines.of_others(self)
        before, self._cpu_s = self._cpu_s, {tid: vitals.cpu_s(os.getpid(), tid) or 0.0 for tid in mine}
        return sum(max(0.0, cpu_s - before.get(tid, 0.0)) for tid, cpu_s in self._cpu_s.items())

    def end(self) -> None:
        self._engines.ended(self)


def _tids() -> set[int]:
    with suppress(OSError):
        return {int(name) for name in os.listdir("/proc/self/task")}
    return set()


def _workers() -> set[int | None]:
    return {thread.native_id for thread in threading.enumerate() if thread.name.startswith(WORKERS)}
