"""A host that is a process of its own, as the daemon sees it: orders down its stdin, events up its stdout, its log
line by line with the model's id, and its end, with the reason.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import Signals
from typing import Any, Final, cast

import msgspec

from helexa.core import logs
from helexa.neuron import host_messages, vitals
from helexa.neuron.host_messages import Failed, Load, Loaded, Order, Progress, Quit, Ready
from helexa.neuron.load_watch import IDLE_CPU, LOOK_S, LoadWatch
from helexa.neuron.step_watch import StepWatch, report_of

_log = logs.get("neuron.hosts")

QUIT_S: Final = 5.0  # an engine that was asked to quit gets this long
REAP_S: Final = 5.0  # after SIGKILL; longer means that the kernel cannot end it (a driver's call)
LAST_WORDS_S: Final = 0.5  # for output that is still in the pipes of a process that ended
TAIL_LINES: Final = 8
LINE_LIMIT: Final = 500  # characters of a line in the reason of a death
PARTIAL_LIMIT: Final = 1 << 20  # bytes of a line that does not end
SPARED_ENV: Final = "NEURON_"  # the daemon's own settings, its token among them, are no business of an engine

OnProgress = Callable[[float | None], None]


class HostFailed(Exception):
    """The host could not be started, could not load, or ended. str() is the reason. out_of_memory: for want of it, as
    far as can be told: the kernel ends a process with the same signal as a person."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


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
        self._out_of_memory = False
        self._closing = False
        self._rests = {1: b"", 2: b""}
        self._alive_at = time.monotonic()
        self._cpu_s = 0.0
        self._steps: StepWatch | None = None  # where its harness asks to be watched
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
        watch = LoadWatch(self._pids, size_bytes)
        self._order(Load(harness, spec))
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

    async def close(self, within_s: float = QUIT_S) -> bool:
        self._closing = True
        if self.is_alive and within_s > 0:
            self._order(Quit())
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
        report_of(self.socket).unlink(missing_ok=True)
        return self._gone.is_set()

    async def gone(self) -> None:
        await self._gone.wait()

    def memory(self) -> vitals.Memory | None:
        """Its own, and what its ranks hold."""
        each = [memory for pid in self._pids() if (memory := vitals.memory(pid)) is not None]
        if not each:
            return None
        return vitals.Memory(own=sum(m.own for m in each), mapped=sum(m.mapped for m in each))

    def look(self) -> None:
        pid = self.pid
        cpu_s = None if pid is None else vitals.cpu_s(pid)
        if cpu_s is None:
            return
        now = time.monotonic()
        if cpu_s - self._cpu_s > IDLE_CPU:  # looked at once a second
            self._alive_at = now
        self._cpu_s = cpu_s
        watch = self._watch()
        if watch is not None and (reason := watch.why_stuck()) is not None:
            self._end_stuck(reason)

    def alive_at(self) -> float:
        return self._alive_at

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rests[fd] + data).split(b"\n")
        self._rests[fd] = rest[-PARTIAL_LIMIT:]
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

    def _watch(self) -> StepWatch | None:
        if self._steps is None and self.is_alive and self.model_id is not None:
            self._steps = StepWatch.open(report_of(self.socket))
        return self._steps

    def _pids(self) -> list[int]:
        """Of its processes, while it lives. What a host says of its ranks is taken for those alone that are its own."""
        pid = self.pid
        if pid is None or not self.is_alive:
            return []
        watch = self._watch()
        return [pid, *(rank for rank in watch.ranks() if vitals.parent(rank) == pid)] if watch is not None else [pid]

    def _end_stuck(self, reason: str) -> None:
        """The watchdog's: host and ranks at once. One inside a collective cannot be asked to leave it."""
        self._failure = self._failure or f"the engine stood still: {reason}; the host was killed"
        _log.error("an engine stood still and is killed", model=self.model_id, pid=self.pid, reason=reason)
        for pid in reversed(self._pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, Signals.SIGKILL)

    def _event(self, line: bytes) -> None:
        try:
            event = host_messages.events.decode(line)
        except msgspec.DecodeError:
            _log.error("a host sent what is no event", model=self.model_id, pid=self.pid, line=repr(line[:200]))
            return
        match event:
            case Ready():
                _settle(self._ready)
            case Progress(fraction):
                self._told = fraction
            case Loaded():
                _settle(self._loaded)
            case Failed(error, out_of_memory):
                self._failure, self._out_of_memory = error, out_of_memory

    def _end(self) -> None:
        if self._gone.is_set():
            return
        reason = self._failure or self._how_it_ended()
        killed = self._failure is None and self._transport.get_returncode() == -Signals.SIGKILL and not self._closing
        failed = HostFailed(reason, out_of_memory=self._out_of_memory or killed)
        for waiting in (self._ready, self._loaded):
            if not waiting.done():
                waiting.set_exception(failed)
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

    def _order(self, order: Order) -> None:
        stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
        if not stdin.is_closing():
            stdin.write(host_messages.line(order))

    def _kill(self) -> None:
        try:
            self._transport.kill()
        except ProcessLookupError:
            pass


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(SPARED_ENV)}
    env["PYTHONUNBUFFERED"] = "1"  # a crash must not take the last lines with it
    env.setdefault("GGML_NO_BACKTRACE", "1")  # ggml would start gdb on itself when it aborts
    env.setdefault("MALLOC_ARENA_MAX", "2")  # else each of the engine's server threads keeps an arena of its own
    return env
