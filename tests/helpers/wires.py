"""Both ends of the relay without sockets: transports that remember what was written, so that every cut of the bytes
can be tried in microseconds. The relay, the parser and the pool are the real ones."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from helexa.core.errors import Dialect, HelexaError
from helexa.core.relay.client import ClientConnection
from helexa.core.relay.connection import Connection
from helexa.core.relay.contract import Endpoint, Exchange, Reply, Route
from helexa.core.relay.outbox import Outbox
from helexa.core.relay.server import Server
from helexa.core.relay.upstream import Upstream

CHAT = Endpoint("/v1/chat/completions", Dialect.OPENAI, "/v1/chat/completions")


class Wire(asyncio.Transport):
    """What was written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = self.aborted = self.eof = self.reading_paused = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.closed, "written after the close"
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Recorder:
    """A Director that sends everything to one upstream, and remembers what the relay told it."""

    def __init__(self, *upstreams: Upstream, **route: Any) -> None:
        self.upstreams = list(upstreams)
        self.options = route
        self.exchanges: list[Exchange] = []
        self.failures: list[tuple[HelexaError, bool]] = []
        self.open_routes = 0
        self.finished: list[Exchange] = []
        self.on_route: Callable[[Exchange], Route | Reply | Awaitable[Route | Reply]] | None = None
        self.on_refused: Callable[[int, bytes], HelexaError | None] = lambda status, body: None
        self.stalled = True

    def route(self, exchange: Exchange) -> Route | Reply | Awaitable[Route | Reply]:
        self.exchanges.append(exchange)
        if self.on_route is not None:
            return self.on_route(exchange)
        for upstream in self.upstreams:
            if upstream.name not in exchange.tried:
                self.open_routes += 1
                return Route(upstream, **self.options)
        raise self.failures[-1][0]

    def progress(self, exchange: Exchange) -> bytes | None:
        return b"loading: 43 %"

    def refused(self, exchange: Exchange, route: Route, status: int, body: bytes) -> HelexaError | None:
        return self.on_refused(status, body)

    def failed(self, exchange: Exchange, route: Route, error: HelexaError, *, mid_stream: bool) -> None:
        self.failures.append((error, mid_stream))

    def released(self, exchange: Exchange, route: Route) -> None:
        self.open_routes -= 1

    def done(self, exchange: Exchange) -> None:
        self.finished.append(exchange)

    def is_stalled(self, exchange: Exchange, route: Route, silent_s: float) -> bool:
        return self.stalled


class Turn:
    """A turn of the loop, which ends when a test says so."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def end(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()


def client_of(server: Server, turn: Turn | None = None) -> tuple[ClientConnection, Wire]:
    """A client of this server, which has no loop. No turn: every write is alone in its own."""
    server.outbox = Outbox((lambda end: end()) if turn is None else turn.call_soon)
    wire = Wire()
    client = ClientConnection(server)
    client.connection_made(wire)
    return client, wire


def waiting_upstream(name: str = "beast") -> tuple[Upstream, Connection, Wire]:
    """An upstream with one open connection, idle in its pool."""
    upstream = Upstream(name, "http://127.0.0.1:9")
    connection, wire = Connection(upstream), Wire()
    connection.connection_made(wire)
    upstream.give_back(connection)
    return upstream, connection, wire


def request(body: bytes, *lines: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    head = [b"POST " + path + b" HTTP/1.1", b"host: gateway", b"content-length: %d" % len(body), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at these places (any order, taken modulo its length)."""
    at = sorted({c % (len(data) + 1) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


def dechunk(raw: bytes) -> bytes:
    """The body of one whole chunked response; AssertionError where the framing is wrong."""
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while True:
        size, _, rest = rest.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            assert rest == b"\r\n", rest
            return body
        body += rest[:n]
        assert rest[n : n + 2] == b"\r\n"
        rest = rest[n + 2 :]
