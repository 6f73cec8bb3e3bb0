"""The server side: HTTP/1.1 connections of clients on one port, each request handed to the relay or to the ASGI app.

Limits and deadlines are kept by one sweeper a second over all connections, never by a timer per request.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

from helexa.core import logs
from helexa.core.config import Limits, Timeouts
from helexa.core.errors import (
    HelexaError,
    ShuttingDown,
)
from helexa.core.relay import wire
from helexa.core.relay.asgi import ASGIApp
from helexa.core.relay.client import ClientConnection
from helexa.core.relay.contract import Director, Endpoint
from helexa.core.relay.outbox import Outbox

_log = logs.get("http")


class Server:
    """One listening program. Owned by the loop that `listen` ran in.

    director, endpoints:  POSTs to an endpoint's path go to the relay
    app:                  everything else
    inside:               the callers are gateways of ours: x-helexa-model and x-helexa-usage are believed
    cors_origins:         origins ("*" for any) that browsers may call the relay's paths from; the app has its own
    """

    def __init__(
        self,
        *,
        director: Director | None,
        endpoints: Sequence[Endpoint] = (),
        app: ASGIApp | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        body_limit_mb: int = 64,
        inside: bool = False,
        cors_origins: Sequence[str] = (),
    ) -> None:
        self.director = director
        self.endpoints = {e.path.encode(): e for e in endpoints} if director is not None else {}
        self.app = app
        self.timeouts = timeouts or Timeouts()
        self.limits = limits or Limits()
        self.body_limit = body_limit_mb << 20
        self.inside = inside
        self.cors_origins = frozenset(o.encode() for o in cors_origins)
        self.outbox = Outbox()
        self.connections: set[ClientConnection] = set()
        self.by_address: Counter[str] = Counter()
        self.on_tick: list[Callable[[float], None]] = []
        self.refusing: HelexaError | None = None
        self.date_line = wire.date_line()
        self.tasks: set[asyncio.Task[None]] = set()
        self.inflight = 0  # exchanges that the relay works on
        self._listeners: list[asyncio.AbstractServer] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None  # there while a drain waits for it
        self._id_prefix = f"{os.urandom(5).hex()}-"
        self._ids = 0

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Bind and serve; the address really bound. Raises OSError (EADDRINUSE) as the loop does."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: ClientConnection(self), host, port, backlog=2048)
        self._started(listener)
        bound = listener.sockets[0].getsockname()
        return bound[0], bound[1]

    async def listen_unix(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        self._started(await loop.create_unix_server(lambda: ClientConnection(self), path, backlog=2048))

    def _started(self, listener: asyncio.AbstractServer) -> None:
        self._listeners.append(listener)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(1.0, self._sweep)

    def new_id(self) -> str:
        self._ids += 1
        return f"{self._id_prefix}{self._ids:x}"

    # the end

    def stop_accepting(self, error: HelexaError) -> None:
        """A drain begins: each new inference request gets `error`; the control plane still answers."""
        self.refusing = error

    async def drain(self, within_s: float) -> int:
        """Wait until no exchange runs, at most `within_s`. Returns how many were cut, after telling their clients."""
        if self.inflight:
            self._emptied = asyncio.Event()
            try:
                async with asyncio.timeout(within_s):
                    await self._emptied.wait()
            except TimeoutError:
                pass
        left = [c.pair for c in self.connections if c.pair is not None]
        for pair in left:
            pair.fail(ShuttingDown("Shutting down, and this answer was not finished in time; ask again"))
        return len(left)

    async def close(self) -> None:
        """Listeners, connections and tasks are gone afterwards."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.shut()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()
        for connection in list(self.connections):
            connection.transport.abort()

    def pair_ended(self) -> None:
        """For connections."""
        self.inflight -= 1
        if self._emptied is not None and not self.inflight:
            self._emptied.set()

    def _sweep(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(1.0, self._sweep)
        now = monotonic()
        self.date_line = wire.date_line()
        for connection in list(self.connections):
            try:
                connection.sweep(now)
            except Exception:  # one connection's fault must not end the deadlines of all others
                _log.exception("sweep failed", peer=connection.address)
                connection.abort()
        for tick in self.on_tick:
            try:
                tick(now)
            except Exception:
                _log.exception("tick failed")
