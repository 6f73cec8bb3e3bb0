"""The pool of a leader whose own work is on threads that are no loop's: an engine's, a host process's main thread.

The loop of the pool runs on a thread of its own, which lives as long as the ranks: the kernel ends them with the thread
that started them.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from helexa.neuron.tp import rpc
from helexa.neuron.tp.collective import Collective
from helexa.neuron.tp.comm import Comm
from helexa.neuron.tp.holder import LOADER
from helexa.neuron.tp.pool import INIT_S, PING_S, WorkerPool

NEURON: Final = (sys.executable, "-P", "-m", "helexa.neuron")
END_S: Final = 15.0  # for a pool to be gone, kills and reaping counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """Where ranks run and how they come together. devices: by rank, the leader's first. folder: the model's own,
    private. program: what `neuron` is. loader: the engine's, known to every rank, "module:function"."""

    backend: str
    folder: Path
    devices: tuple[int, ...]
    program: tuple[str, ...] = NEURON
    loader: str = LOADER

    @property
    def world_size(self) -> int:
        return len(self.devices)


class Leader:
    """A pool whose ranks are in their group. `close` it, whatever happened; every call but `post_step` blocks until
    it is done, and none comes from the loop's own thread."""

    def __init__(self, group: Group, within_s: float = INIT_S) -> None:
        """Raises PoolFailed; no rank is left then."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ranks", daemon=True)
        self._thread.start()
        try:
            self._pool = self._run(
                WorkerPool.spawn(group.program, group.world_size, group.devices, ("--loader", group.loader))
            )
        except BaseException:
            self._stop()
            raise
        try:
            self._run(self._pool.ping_all(PING_S))
            comm = Comm.new(group.backend, group.folder)
            self.collective: Collective = self._run(self._pool.init(comm, group.devices[0], within_s))
            self._run(self._pool.sanity_check())
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the ranks that are processes."""
        return self._pool.pids

    def load(self, own: Callable[[], T], specs: Sequence[dict[str, Any]], within_s: float) -> T:
        """`own` runs on another thread. Raises PoolFailed."""
        loaded, _ = self._run(self._pool.load(own, specs, within_s))
        return loaded

    def post_step(self, step: msgspec.Raw) -> None:
        """HOT; as the pool's."""
        self._pool.post_step(step)

    def drop(self, slabs: list[int]) -> None:
        self._run(self._pool.drop(slabs))

    def clear(self) -> None:
        self._run(self._pool.clear())

    def memory(self) -> list[rpc.QueryMemoryOk]:
        return self._run(self._pool.memory())

    def tell_failure(self, failed: Callable[[str], None]) -> None:
        """Called once, on the loop's thread, when the pool has failed: the ranks are being killed by then."""

        def told(reason: asyncio.Future[str]) -> None:
            if not reason.cancelled():
                failed(reason.result())

        self._loop.call_soon_threadsafe(self._pool.failed.add_done_callback, told)

    def fail(self, reason: str) -> None:
        """End every rank. Returns at once; a failure that was there before keeps its reason."""
        self._loop.call_soon_threadsafe(self._pool.fail, reason)

    def close(self) -> None:
        """No rank is left when it returns; those that can are asked first. Idempotent."""
        if not self._loop.is_running():
            return
        ended = self._pool.failed.done()
        try:
            self._run(self._pool.close() if ended else self._pool.shutdown(), END_S)
        finally:
            self._stop()

    def _run(self, work: Coroutine[Any, Any, T], within_s: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(within_s)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():
            self._loop.close()
