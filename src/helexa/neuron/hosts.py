"""The daemon's side of its hosts: starting, loading, watching, ending. Which model and why is not decided here.

A host is a process of ours (`ProcessHost`) or, with isolation = "none", a thread of the daemon (`ThreadHost`). One
started process waits as the spare, imports done. All calls come from the daemon's loop, on a thread that lives as
long as the daemon: the kernel ends a host with the thread that spawned it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any, Final, Protocol, cast

from helexa.core import logs
from helexa.neuron import vitals
from helexa.neuron.harness import open_harness
from helexa.neuron.run_dir import RunDir

_log = logs.get("neuron.hosts")

LOOK_S: Final = 0.25  # between two looks at a load from outside
QUIT_S: Final = 5.0  # an engine that was asked to quit gets this long
REAP_S: Final = 5.0  # after SIGKILL; longer means that the kernel cannot end it (a driver's call)
LAST_WORDS_S: Final = 0.5  # for output that is still in the pipes of a process that ended
STUCK_S: Final = 120.0  # a load in which nothing is read and no processor time passes
BUSY_STUCK_S: Final = 1200.0  # ... in which nothing is read but the processor works: kernels are compiled for minutes
IDLE_CPU: Final = 0.03  # of one core: below it a host only waits
TAIL_LINES: Final = 8
LINE_LIMIT: Final = 500
SPARED_ENV: Final = "NEURON_"  # the daemon's own settings, its token among them, are no business of an engine

OnProgress = Callable[[float | None], None]


class HostFailed(Exception):
    """The host could not be started, could not load, or ended. str() is the reason."""


class Host(Protocol):
    """died: done when the host is gone that should not be; its result is the reason.
    socket: where its engine will answer; gone with the host.
    """

    died: asyncio.Future[str]
    socket: Path

    async def load(self, harness: str, spec: dict[str, Any], size_bytes: int, progress: OnProgress) -> None:
        """Returns when the engine answers on its socket. Raises HostFailed; after that, or a cancel, `close` it."""

    async def close(self, within_s: float = QUIT_S) -> None:
        """Quit, or be killed after `within_s` (0: at once). Returns when it is gone; idempotent."""

    def memory(self) -> vitals.Memory | None: ...

    @property
    def pid(self) -> int | None:
        """None where it has no process of its own."""

    def look(self) -> None:
        """Once a second: has it been at work since the last look?"""

    def alive_at(self) -> float:
        """Monotonic time of the last sign of life."""


class ProcessHost(asyncio.SubprocessProtocol):
    """A host process, from its start to its end."""

    def __init__(self, harness: str, socket: Path) -> None:
        loop = asyncio.get_running_loop()
        self.harness = harness
        self.socket = socket
        self.model_id: str | None = None  # None: the spare
        self.died: asyncio.Future[str] = loop.create_future()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._ready: asyncio.Future[None] = loop.create_future()
        self._loaded: asyncio.Future[None] = loop.create_future()
        self._gone = asyncio.Event()
        self._pipes_open = 2
        self._told: float | None = None  # the engine's own progress
        self._failure: str | None = None  # the engine's own reason
        self._closing = False
        self._rests = {1: b"", 2: b""}
        self._alive_at = time.monotonic()
        self._cpu_s = 0.0
        self._transport = cast("asyncio.SubprocessTransport", None)

    @classmethod
    async def start(cls, harness: str, socket: Path) -> ProcessHost:
        """Started, not yet warm. HostFailed where the process cannot be made."""
        command = (sys.executable, "-P", "-m", "helexa.neuron.host", "--harness", harness, "--parent", str(os.getpid()))
        loop = asyncio.get_running_loop()
        host = cls(harness, socket)
        try:
            # A session of its own: Ctrl-C on a terminal is for the daemon, which drains and then ends its hosts.
            await loop.subprocess_exec(lambda: host, *command, env=_environment(), start_new_session=True)
        except OSError as err:
            raise HostFailed(f"a host process could not be started: {err}") from err
        except asyncio.CancelledError:
            if host._transport is not None:
                host._transport.close()  # kills it
            raise
        return host

    @property
    def pid(self) -> int | None:
        return self._transport.get_pid()

    @property
    def is_alive(self) -> bool:
        return self._transport.get_returncode() is None

    async def warm(self) -> None:
        """Returns when its imports are done. Raises HostFailed."""
        await asyncio.shield(self._ready)

    async def load(self, harness: str, spec: dict[str, Any], size_bytes: int, progress: OnProgress) -> None:
        await self.warm()
        pid = self.pid
        assert pid is not None
        watch = _LoadWatch(pid, size_bytes)
        self._order(op="load", harness=harness, spec=spec)
        while True:
            done, _ = await asyncio.wait({self._loaded}, timeout=LOOK_S)
            if done:
                self._loaded.result()
                self._alive_at = time.monotonic()
                return
            watch.look(self._told)
            progress(watch.fraction)
            if reason := watch.why_stuck():
                raise HostFailed(reason)

    async def close(self, within_s: float = QUIT_S) -> None:
        self._closing = True
        if self.is_alive and within_s > 0:
            self._order(op="quit")
            try:
                async with asyncio.timeout(within_s):
                    await self._gone.wait()
            except TimeoutError:
                _log.warning("a host did not quit and is killed", model=self.model_id, pid=self.pid, within_s=within_s)
        if not self._gone.is_set():
            self._kill()
            try:
                async with asyncio.timeout(REAP_S):
                    await self._gone.wait()
            except TimeoutError:
                _log.error("a host cannot be killed: it is inside the kernel", model=self.model_id, pid=self.pid)
        self._transport.close()
        self.socket.unlink(missing_ok=True)

    def memory(self) -> vitals.Memory | None:
        pid = self.pid
        return None if pid is None or not self.is_alive else vitals.memory(pid)

    def look(self) -> None:
        pid = self.pid
        cpu_s = None if pid is None else vitals.cpu_s(pid)
        if cpu_s is None:
            return
        now = time.monotonic()
        if cpu_s - self._cpu_s > IDLE_CPU:  # looked at once a second
            self._alive_at = now
        self._cpu_s = cpu_s

    def alive_at(self) -> float:
        return self._alive_at

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rests[fd] + data).split(b"\n")
        self._rests[fd] = rest[-(1 << 20) :]
        for line in lines:
            if fd == 1:
                self._event(line)
            elif text := line.decode(errors="replace").rstrip():
                self.tail.append(text[:LINE_LIMIT])
                _log.debug(text, model=self.model_id, pid=self.pid)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self._rests:
            self._pipes_open -= 1
            if not self._pipes_open and not self.is_alive:
                self._end()

    def process_exited(self) -> None:
        if self._pipes_open:  # its last words, unless a process that it left behind holds the pipes
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._end)
        else:
            self._end()

    # ours

    def _event(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            _log.error("a host sent what is no event", model=self.model_id, pid=self.pid, line=repr(line[:200]))
            return
        if kind == "ready":
            _settle(self._ready)
        elif kind == "progress":
            self._told = event["fraction"]
        elif kind == "loaded":
            _settle(self._loaded)
        elif kind == "failed":
            self._failure = event["error"]

    def _end(self) -> None:
        if self._gone.is_set():
            return
        reason = self._failure or self._how_it_ended()
        for waiting in (self._ready, self._loaded):
            if not waiting.done():
                waiting.set_exception(HostFailed(reason))
                waiting.exception()  # nobody may be waiting: not an error then
        self._gone.set()
        if not self._closing and not self.died.done():
            self.died.set_result(reason)
        self._transport.close()

    def _how_it_ended(self) -> str:
        code = self._transport.get_returncode() or 0
        how = f"exit code {code}"
        if code < 0:
            how = Signals(-code).name
            if how == "SIGKILL" and not self._closing:
                how += ", by hand or because the host ran out of memory"
        words = f"; its last lines: {' | '.join(self.tail)}" if self.tail else ""
        return f"the host process ended ({how}){words}"

    def _order(self, **order: Any) -> None:
        stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
        if not stdin.is_closing():
            stdin.write(json.dumps(order).encode() + b"\n")

    def _kill(self) -> None:
        try:
            self._transport.kill()
        except ProcessLookupError:
            pass


class ThreadHost:
    """isolation = "none": the engine in the daemon's own process. It cannot be killed, nor its death survived."""

    def __init__(self, model_id: str, socket: Path) -> None:
        self.model_id = model_id
        self.socket = socket
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._engine: Any = None
        self._memory: vitals.Memory | None = None
        self._working: asyncio.Future[Any] | None = None

    @property
    def pid(self) -> int | None:
        return None

    async def load(self, harness: str, spec: dict[str, Any], size_bytes: int, progress: OnProgress) -> None:
        loop = asyncio.get_running_loop()
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        before = vitals.memory(os.getpid())

        def tell(fraction: float) -> None:
            loop.call_soon_threadsafe(progress, fraction)

        self._working = _in_thread(lambda: open_harness(harness).serve(spec, tell), f"load {self.model_id}")
        try:
            self._engine = await asyncio.shield(self._working)
        except asyncio.CancelledError:
            raise
        except Exception as err:
            raise HostFailed(str(err) or type(err).__name__) from err
        after = vitals.memory(os.getpid())
        if before is not None and after is not None:
            self._memory = vitals.Memory(max(0, after.own - before.own), max(0, after.mapped - before.mapped))

    async def close(self, within_s: float = QUIT_S) -> None:
        if self._working is not None:
            working, self._working = self._working, None
            await asyncio.wait({working})  # a load cannot be cut short
            self._engine = None if working.exception() else working.result()
        engine, self._engine = self._engine, None
        if engine is not None:
            await _in_thread(engine.close, f"close {self.model_id}")
        self.socket.unlink(missing_ok=True)
        self._memory = None

    def memory(self) -> vitals.Memory | None:
        """What the daemon grew by during the load."""
        return self._memory

    def look(self) -> None:
        pass

    def alive_at(self) -> float:
        return time.monotonic()  # as far as anybody can tell from inside


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

    async def take(self, model_id: str, harness: str) -> Host:
        """A host for this model: the spare if it is of this harness and well, else a new one. `close` it at the end."""
        if self._isolation == "none":
            return ThreadHost(model_id, self._run_dir.new_socket())
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


class _LoadWatch:
    """How far a load is, told from outside: bytes that the process read or mapped, of the size of its files."""

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


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(SPARED_ENV)}
    env["PYTHONUNBUFFERED"] = "1"  # a crash must not take the last lines with it
    env.setdefault("GGML_NO_BACKTRACE", "1")  # ggml would start gdb on itself when it aborts
    env.setdefault("MALLOC_ARENA_MAX", "2")  # else each of the engine's server threads keeps an arena of its own
    return env
