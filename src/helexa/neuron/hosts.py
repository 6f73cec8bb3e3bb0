"""The hosts of this node: where models run. Which model and why is not decided here.

A host is a process of ours (`ProcessHost`) or, with isolation = "none", a thread of the daemon (`ThreadHost`). One
started process waits as the spare, imports done. All calls come from the daemon's loop, on a thread that lives as
long as the daemon: the kernel ends a host with the thread that spawned it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from helexa.core import logs
from helexa.neuron import vitals
from helexa.neuron.engine_threads import Engines, EngineThreads
from helexa.neuron.freed import give_back_freed
from helexa.neuron.harness import open_harness
from helexa.neuron.load_watch import IDLE_CPU
from helexa.neuron.process_host import QUIT_S, HostFailed, OnProgress, ProcessHost
from helexa.neuron.run_dir import RunDir
from helexa.neuron.tasks import owned

__all__ = ["QUIT_S", "Host", "HostFailed", "Hosts", "OnProgress", "ProcessHost", "ThreadHost"]

_log = logs.get("neuron.hosts")

END_S: Final = 5.0  # beyond what it was given; longer means that an engine does not let go
M_ARENA_MAX: Final = -8  # malloc.h
_libc: Final = ctypes.CDLL(None)


class Host(Protocol):
    """died: done when the host is gone that should not be; its result is the reason.
    socket: where its engine will answer; gone with the host.
    """

    died: asyncio.Future[str]
    socket: Path

    async def load(self, harness: str, spec: dict[str, Any], size_bytes: int, progress: OnProgress) -> None:
        """Returns when the engine answers on its socket. Raises HostFailed; after that, or a cancel, `close` it."""

    async def close(self, within_s: float = QUIT_S) -> bool:
        """Quit, or be killed after `within_s` (0: at once). Whether it is gone: False where nothing can end it, and
        what it holds stays taken. Bounded either way; idempotent."""

    async def gone(self) -> None:
        """After `close`: returns when it is gone, however long that takes."""

    def memory(self) -> vitals.Memory | None: ...

    @property
    def pid(self) -> int | None:
        """None where it has no process of its own."""

    def look(self) -> None:
        """Once a second: has it been at work since the last look?"""

    def alive_at(self) -> float:
        """Monotonic time of the last sign of life."""


class LoadGivenUp(Exception):
    """Raised in the thread that loads, by the way of its progress."""


class ThreadHost:
    """isolation = "none": the engine in the daemon's own process. It cannot be killed, nor its death survived: a load
    ends where the engine next tells of its progress, and an engine that does not let go stays until the daemon ends.
    """

    def __init__(self, model_id: str, socket: Path, engines: Engines) -> None:
        self.model_id = model_id
        self.socket = socket
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._engines = engines
        self._threads: EngineThreads | None = None
        self._engine: Any = None
        self._memory: vitals.Memory | None = None
        self._loading: asyncio.Future[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closing = False
        self._alive_at = time.monotonic()

    @property
    def pid(self) -> int | None:
        return None

    async def load(self, harness: str, spec: dict[str, Any], size_bytes: int, progress: OnProgress) -> None:
        loop = asyncio.get_running_loop()
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        _few_arenas()
        before = vitals.memory(os.getpid())
        self._threads = self._engines.begin()

        def tell(fraction: float) -> None:
            if self._closing:
                raise LoadGivenUp(f"the load of {self.model_id} was given up")
            loop.call_soon_threadsafe(progress, fraction)

        self._loading = _in_thread(lambda: open_harness(harness).serve(spec, tell), f"load {self.model_id}")
        try:
            self._engine = await asyncio.shield(self._loading)
        except asyncio.CancelledError:
            raise
        except Exception as err:
            raise HostFailed(str(err) or type(err).__name__, out_of_memory=isinstance(err, MemoryError)) from err
        self._threads.loaded()
        after = vitals.memory(os.getpid())
        if before is not None and after is not None:
            self._memory = vitals.Memory(max(0, after.own - before.own), max(0, after.mapped - before.mapped))
        self._alive_at = time.monotonic()

    async def close(self, within_s: float = QUIT_S) -> bool:
        self._closing = True
        if self._ending is None:
            self._ending = owned(self._end(), f"end {self.model_id}")
        _, late = await asyncio.wait({self._ending}, timeout=within_s + END_S)
        if late:
            _log.error("an engine in this process cannot be ended; what it holds stays taken", model=self.model_id)
        return not late

    async def gone(self) -> None:
        if self._ending is not None:
            await asyncio.wait({self._ending})

    async def _end(self) -> None:
        if self._loading is not None:
            await asyncio.wait({self._loading})
            self._engine = None if self._loading.exception() else self._loading.result()
            self._loading = None
        engine, self._engine = self._engine, None
        if engine is not None:
            await _in_thread(engine.close, f"close {self.model_id}")
            del engine
            await asyncio.to_thread(give_back_freed)
        if self._threads is not None:
            self._threads.end()
        self.socket.unlink(missing_ok=True)
        self._memory = None

    def memory(self) -> vitals.Memory | None:
        """What the daemon grew by during the load."""
        return self._memory

    def look(self) -> None:
        if self._threads is not None and self._threads.worked_s() > IDLE_CPU:
            self._alive_at = time.monotonic()

    def alive_at(self) -> float:
        return self._alive_at


class Hosts:
    """All hosts of the daemon, and the spare."""

    def __init__(self, run_dir: RunDir, *, isolation: str, spare: bool) -> None:
        self._run_dir = run_dir
        self._isolation = isolation
        self._wants_spare = spare and isolation == "process"
        self.spare_harness: str | None = None  # which harness the spare is warm for; None: no spare
        self._spare: ProcessHost | None = None
        self._spare_task: asyncio.Task[None] | None = None
        self._closed = False
        self._engines = Engines()

    async def take(self, model_id: str, harness: str, *, own_process: bool) -> Host:
        """A host for this model: the spare if it is of this harness and well, else a new one. `close` it at the end.
        own_process: a process, whatever the isolation."""
        if self._isolation == "none" and not own_process:
            return ThreadHost(model_id, self._run_dir.new_socket(), self._engines)
        spare, self._spare = self._spare, None
        if spare is not None and (not spare.is_alive or spare.harness != harness):
            await spare.close(0)
            spare = None
        host = spare or await ProcessHost.start(harness, self._run_dir.new_socket())
        host.model_id = model_id
        return host

    def prepare_spare(self) -> None:
        """Have a spare waiting, unless there is one; to be called when a load is over, not while it needs the cores."""
        harness = self.spare_harness
        if not self._wants_spare or harness is None or self._closed:
            return
        if self._spare_task is not None and not self._spare_task.done():
            return
        if self._spare is None or not self._spare.is_alive:
            self._spare_task = asyncio.get_running_loop().create_task(self._start_spare(harness))

    async def renew_spare(self) -> None:
        """End the spare that waits, and start another."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            await spare.close()
            self.prepare_spare()

    async def close(self) -> None:
        """The spare is gone and the folder of sockets removed. Hosts that were taken are closed by who took them."""
        self._closed = True
        if self._spare_task is not None:
            await asyncio.gather(self._spare_task, return_exceptions=True)
        if self._spare is not None:
            spare, self._spare = self._spare, None
            await spare.close(0)
        self._run_dir.remove()

    async def _start_spare(self, harness: str) -> None:
        if self._spare is not None:
            await self._spare.close(0)
            self._spare = None
        try:
            spare = await ProcessHost.start(harness, self._run_dir.new_socket())
        except HostFailed as err:
            _log.warning("no spare host", reason=str(err))
            return
        self._spare = spare


def _few_arenas() -> None:
    """Two malloc arenas for all the engine's threads, as MALLOC_ARENA_MAX does for a host process.

    Measured over 100 loads of SmolLM2 in the daemon: 44 MB of its own afterwards in place of 92.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, 2)


def _in_thread(work: Callable[[], Any], name: str) -> asyncio.Future[Any]:
    """A thread of its own: the default executor's few threads are for short work, and an exit waits for them."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = work()
        except Exception as err:
            error = err
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
