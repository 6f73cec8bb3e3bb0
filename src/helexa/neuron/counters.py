"""Hosts that count the tokens of models which are not loaded: they have tokenizer and template, and no weights.

One is started by the first count of a model and kept for a while, since whoever counts will count again. There are
MOST at a time, the least recently used goes first, and all of them go when a load begins, so that none stands in the
way of a model; what they hold is in the ledger as memory that yields. All calls come from the daemon's loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from helexa.core import logs
from helexa.core.errors import HelexaError, LoadFailed, Overloaded
from helexa.core.lifecycle import LoadRequest
from helexa.core.relay.upstream import Upstream
from helexa.neuron.devices import Devices
from helexa.neuron.harness import reference
from helexa.neuron.harness.base import Harness, ModelFiles, Plan, Session
from helexa.neuron.hosts import QUIT_S, Host, HostFailed, Hosts
from helexa.neuron.memory import Claim, DoesNotFit
from helexa.neuron.planner import Planner
from helexa.neuron.serving import end_host
from helexa.neuron.tasks import owned

_log = logs.get("neuron.counters")

MOST: Final = 2
IDLE_S: Final = 60.0
CONNECTIONS: Final = 2

Key = tuple[str, tuple[tuple[str, int, int], ...]]  # the profile's hash; (path, size, time of change) of each file


@dataclass(slots=True, eq=False)
class _Counter:
    """opening: done when its host answers. seated: one of MOST."""

    key: Key
    model_id: str
    opening: asyncio.Task[None] | None = None
    host: Host | None = None
    upstream: Upstream | None = None
    session: Session | None = None
    claim: Claim | None = None
    seated: bool = False
    active: int = 0
    last_used: float = field(default_factory=time.monotonic)


class Counters:
    def __init__(self, hosts: Hosts, planner: Planner, devices: Devices) -> None:
        self._hosts = hosts
        self._planner = planner
        self._devices = devices
        self._counters: dict[Key, _Counter] = {}
        self._leaving: set[_Counter] = set()  # they end with their last count
        self._ending: set[asyncio.Task[None]] = set()
        self._seated = 0
        self._room = asyncio.Event()  # one of the seated may go, or has gone
        self._closed: Callable[[], HelexaError] | None = None

    async def count(self, request: LoadRequest, files: ModelFiles, body: bytes) -> int:
        """Raises what the request itself would, Overloaded where there is no memory even for this, LoadFailed,
        ConnectionError and TimeoutError where the host did not answer."""
        key = (request.spec_hash(), await asyncio.to_thread(_state_of, files))
        if self._closed is not None:
            raise self._closed()
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = _Counter(key, files.model_id)
            counter.opening = owned(self._open(counter, request, files))
        counter.active += 1
        try:
            assert counter.opening is not None
            await asyncio.wait({counter.opening})  # it goes on when this caller leaves
            if self._closed is not None:
                raise self._closed()
            counter.opening.result()
            assert counter.session is not None
            assert counter.upstream is not None
            return await counter.session.count_tokens(body, counter.upstream)
        except ConnectionError:
            if self._closed is not None:  # it was cut by us
                raise self._closed() from None
            raise
        finally:
            counter.active -= 1
            counter.last_used = time.monotonic()
            if not counter.active:
                self._room.set()
                if counter in self._leaving:
                    self._end(counter)

    def look(self) -> None:
        """Once a second: who has not counted for IDLE_S goes."""
        now = time.monotonic()
        for counter in list(self._counters.values()):
            if now - counter.last_used > IDLE_S:
                self._dismiss(counter)

    async def make_way(self) -> None:
        """Before a load: all go, those at work when their count is done."""
        for counter in list(self._counters.values()):
            self._dismiss(counter)
        if self._ending:
            await asyncio.wait(set(self._ending))

    async def close(self, refuse: Callable[[], HelexaError]) -> None:
        """All are gone; who counts is cut. refuse: what is told from now on."""
        self._closed = refuse
        for counter in [*self._counters.values(), *self._leaving]:
            self._end(counter)
        self._counters.clear()
        while self._ending:
            await asyncio.wait(set(self._ending))

    # ours

    async def _open(self, counter: _Counter, request: LoadRequest, files: ModelFiles) -> None:
        try:
            harness, plan = await self._planner.alone(request, files)
            session = harness.session(plan)
            session.check_chats()
            while self._seated >= MOST:
                await self._someone_goes()
            counter.seated = True
            self._seated += 1
            claim = counter.claim = self._devices.reserve_beside(files.model_id, harness.counting_mb(plan))
            await self._start(counter, harness, plan)
            assert counter.host is not None
            await self._devices.measure(claim, counter.host)
            assert counter.upstream is not None
            await session.learn(counter.upstream)
            counter.session = session
            counter.host.died.add_done_callback(lambda _: self._died(counter))
            _log.info("counts tokens without weights", model=counter.model_id, pid=counter.host.pid)
        except BaseException as err:
            if self._counters.get(counter.key) is counter:
                del self._counters[counter.key]
            await self._close(counter)
            if isinstance(err, DoesNotFit):
                raise Overloaded(
                    f"There is no memory to count the tokens of {files.model_id} with: {err}. Unload a model, or load "
                    "this one."
                ) from err
            if isinstance(err, HostFailed):
                raise LoadFailed(f"The tokens of {files.model_id} cannot be counted: {err}") from err
            raise
        finally:
            self._hosts.prepare_spare()

    async def _start(self, counter: _Counter, harness: Harness, plan: Plan) -> None:
        key = secrets.token_urlsafe(24)
        counts = harness.counter()
        name = reference(counts)
        host = counter.host = await self._hosts.take(counter.model_id, name, own_process=counts.own_process)
        spec = harness.counting_spec(plan, host.socket, key)
        await host.load(name, spec, 0, lambda fraction: None)
        headers = {"authorization": f"Bearer {key}"}
        counter.upstream = Upstream(counter.model_id, f"unix:{host.socket}", headers=headers, max_idle=CONNECTIONS)

    async def _someone_goes(self) -> None:
        """The one that was not used for longest, of those that nobody uses, or else the first that comes to rest."""
        free = [c for c in self._counters.values() if c.seated and not c.active]
        self._room.clear()
        if free:
            self._dismiss(min(free, key=lambda c: c.last_used))
        await self._room.wait()

    def _dismiss(self, counter: _Counter) -> None:
        del self._counters[counter.key]
        if counter.active:
            self._leaving.add(counter)
        else:
            self._end(counter)

    def _end(self, counter: _Counter) -> None:
        self._leaving.discard(counter)
        task = asyncio.get_running_loop().create_task(self._cut(counter))
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            _log.error("a host that counts did not end well", error=repr(err))

    async def _cut(self, counter: _Counter) -> None:
        if counter.opening is not None and not counter.opening.done():
            counter.opening.cancel()  # closes what it has begun
            await asyncio.wait({counter.opening})
        await self._close(counter)

    async def _close(self, counter: _Counter) -> None:
        """Idempotent."""
        upstream, counter.upstream = counter.upstream, None
        if upstream is not None:
            await upstream.cut_off()
        host, counter.host = counter.host, None
        if host is not None and counter.claim is not None:
            await end_host(host, counter.claim, QUIT_S)
        if counter.claim is not None:
            counter.claim.release()
        if counter.seated:
            counter.seated = False
            self._seated -= 1
        self._room.set()

    def _died(self, counter: _Counter) -> None:
        if self._counters.get(counter.key) is counter:
            _log.error("a host that counts died", model=counter.model_id)
            self._dismiss(counter)


def _state_of(files: ModelFiles) -> tuple[tuple[str, int, int], ...]:
    found = [(path, path.stat()) for path in (*files.files, *_beside(files))]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def _beside(files: ModelFiles) -> list[Path]:
    return [files.projector] if files.projector is not None else []
