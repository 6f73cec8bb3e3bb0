"""The client side: connections to one node or one host, kept alive between requests, and the small calls of the
control plane (fetch, stream) over the same connections.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from helexa.core.relay.connection import Connection, UpstreamClosed
from helexa.core.relay.wire import answer_head

LOOKUP_S = 5.0
_CLOSING_TURNS = 100  # of the loop; an aborted connection needs one or two
_HIGH_WATER = 256 << 10  # decoded bytes a reader of `stream` may leave unread before its connection is paused


class Answer(msgspec.Struct):
    """A whole response of the control plane. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self, kind: Any = Any) -> Any:
        """The body decoded as the type `kind`. Raises msgspec.MsgspecError."""
        return msgspec.json.decode(self.body, type=kind)


class Upstream:
    """Where requests go: one node (seen from the gateway) or one model's host (seen from the daemon).

    url:      "http://host:port[/base]" or "unix:/absolute/path"
    headers:  go with every request
    renew:    a kept connection that the other end closed after it had answered is replaced at once, up to max_idle of
              them idle: for an engine that closes after each stream, whose next request would pay for the opening
    Owned by one loop.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        connect_s: float = 3.0,
        max_idle: int = 256,
        renew: bool = False,
    ) -> None:
        self.name = name
        self.url = url
        self.connect_s = connect_s
        self.max_idle = max_idle
        self.closing = False
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._renew = renew
        self._renewals: set[asyncio.Task[None]] = set()
        self._heads: dict[str, bytes] = {}
        self._unix: str | None = None
        self._host, self._port, self._base = "", 0, ""
        if url.startswith("unix:"):
            self._unix = url[5:]
            authority = "localhost"
        else:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname:
                raise ValueError(f"{url!r} is not an address; use http://host:port")
            self._host, self._port, self._base = parts.hostname, parts.port or 80, parts.path.rstrip("/")
            authority = parts.netloc.rpartition("@")[2]
        self._numeric = _is_numeric(self._host)
        self._known = [self._host] if self._numeric else []
        self._looked_up = -LOOKUP_S
        self._common = f"host: {authority}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())

    def head_for(self, path: str) -> bytes:
        """The constant part of a POST's head: everything but the length's digits and what follows them."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = (
                f"POST {self._base}{path} HTTP/1.1\r\n{self._common}content-type: application/json\r\ncontent-length: "
            ).encode("latin-1")
        return head

    def try_take(self) -> Connection | None:
        """An idle connection, the last used first; None where there is none."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and not connection.transport.is_closing():
                connection.reused = True
                return connection
        return None

    async def open(self) -> Connection:
        """A new connection. Raises OSError, or TimeoutError after connect_s."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.connect_s):
            if self._unix is not None:
                _, made = await loop.create_unix_connection(lambda: Connection(self), self._unix)
                return made
            error: OSError | None = None
            for address in await self._addresses(loop):
                try:
                    _, made = await loop.create_connection(lambda: Connection(self), address, self._port)
                except OSError as err:
                    error = err
                else:
                    return made
            raise error or OSError(f"{self._host} has no address")

    async def _addresses(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        """Where the name leads. The loop has four threads for look-ups: a name that hangs must not take them for every
        connection, so an answer is kept for LOOKUP_S, and the last good one serves while a new one does not come."""
        if self._numeric or loop.time() < self._looked_up + LOOKUP_S:
            return self._known
        self._looked_up = loop.time()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except BaseException:
            if not self._known:
                self._looked_up = -LOOKUP_S
                raise
            return self._known
        self._known = list(dict.fromkeys(str(row[4][0]) for row in found))
        return self._known

    def give_back(self, connection: Connection) -> None:
        if len(self._idle) >= self.max_idle:
            connection.transport.close()
        else:
            self._idle.append(connection)

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def dropped(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection.owner is None and connection in self._idle:
            self._idle.remove(connection)
            wanted = self._renew and connection.served and not self.closing
            if wanted and len(self._idle) + len(self._renewals) < self.max_idle:
                task = asyncio.get_running_loop().create_task(self._replace())
                self._renewals.add(task)
                task.add_done_callback(self._renewals.discard)

    async def _replace(self) -> None:
        try:
            made = await self.open()
        except OSError:  # TimeoutError is one
            return  # the next request opens its own, and tells
        if not made.closed:
            self.give_back(made)  # one that the other end closes unused is not replaced again

    def _stop_renewing(self) -> None:
        self.closing = True
        for task in self._renewals:
            task.cancel()

    def close(self) -> None:
        """Close what is idle; connections in use end with their request."""
        self._stop_renewing()
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.transport.close()

    def abort(self) -> None:
        """Cut every connection, those in use too: their owners hear of it in the loop's next turn."""
        self._stop_renewing()
        for connection in list(self._open):
            connection.transport.abort()

    @property
    def open_connections(self) -> int:
        """Connections whose descriptor is not closed yet."""
        return len(self._open)

    async def cut_off(self) -> None:
        """`abort`, and return when the descriptors are closed."""
        self.abort()
        for _ in range(_CLOSING_TURNS):
            if not self._open and not self._renewals:  # a cancelled one has its socket for another turn
                return
            await asyncio.sleep(0)

    # the control plane

    async def fetch(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = 10.0,
        limit: int = 16 << 20,
    ) -> Answer:
        """One whole request and answer. Raises ConnectionError (or OSError), TimeoutError, ValueError over `limit`."""
        async with asyncio.timeout(timeout_s), self._calling(method, path, body, headers) as call:
            got = bytearray()
            async for part in call:
                got += part
                if len(got) > limit:
                    raise ValueError(f"{self.name}{path}: an answer of over {limit} bytes")
            return Answer(call.status, call.headers, bytes(got))

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        head_timeout_s: float | None = 10.0,
        idle_s: float | None = None,
    ) -> AsyncIterator[Call]:
        """An answer as it comes: `.status`, `.headers`, and iteration over decoded body bytes. Leaving the block
        before the end aborts. idle_s bounds the silence between two reads (TimeoutError)."""
        async with asyncio.timeout(head_timeout_s) as deadline, self._calling(method, path, body, headers) as call:
            deadline.reschedule(None)
            call.idle_s = idle_s
            yield call

    @asynccontextmanager
    async def _calling(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> AsyncIterator[Call]:
        extra = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        if body is not None:
            if not any(k.lower() == "content-type" for k in headers or {}):
                extra += "content-type: application/json\r\n"
            extra += f"content-length: {len(body)}\r\n"
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._common}{extra}\r\n".encode("latin-1")
        call = await self._begin(head + (body or b""), safe=method in ("GET", "HEAD"))
        try:
            yield call
        finally:
            call.end()

    async def _begin(self, request: bytes, *, safe: bool) -> Call:
        # A kept connection may have been closed by the other end just now; only what changes nothing is sent again.
        idle = self.try_take() if safe else None
        if idle is not None:
            call = Call(idle)
            try:
                await call.start(request)
            except UpstreamClosed as gone:
                call.end()
                if not gone.clean:
                    raise
            except BaseException:
                call.end()
                raise
            else:
                return call
        call = Call(await self.open())
        try:
            await call.start(request)
        except BaseException:
            call.end()
            raise
        return call


class Call:
    """One answer of the control plane on its way."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.idle_s: float | None = None
        self._connection = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._error: Exception | None = None
        self._done = False
        self._paused = False
        self._wake = asyncio.Event()
        connection.owner = self

    async def start(self, request: bytes) -> None:
        if self._connection.closed:
            self._connection.owner = None
            raise UpstreamClosed("closed while idle", clean=True)
        self._connection.transport.write(request)
        while not self._connection.headers_done and self._error is None:
            await self._sleep()
        if not self._connection.headers_done:
            raise self._error or UpstreamClosed("closed")
        self.status = self._connection.status
        _, _, length, chunked = answer_head(self._connection.head)
        self._connection.framed = chunked or length is not None
        for line in self._connection.head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name:
                self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")

    async def _sleep(self) -> None:
        self._wake.clear()
        async with asyncio.timeout(self.idle_s):
            await self._wake.wait()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[bytes]:
        while True:
            if self._parts:
                data = b"".join(self._parts)
                self._parts.clear()
                self._size = 0
                if self._paused and not self._connection.closed:
                    self._paused = False
                    self._connection.transport.resume_reading()
                yield data
            elif self._done:
                return
            elif self._error is not None:
                raise self._error
            else:
                await self._sleep()

    def end(self) -> None:
        """The connection goes back if the answer is whole, else it is cut."""
        connection = self._connection
        if connection.owner is self:
            if self._paused and not connection.closed:
                connection.transport.resume_reading()
            if self._done:
                connection.release()
            else:
                connection.abort()

    # Owner

    def read(self, data: bytes) -> None:
        connection = self._connection
        try:
            connection.feed(data)
        except (httptools.HttpParserError, UpstreamClosed) as err:
            self.broken(err)
            return
        self._parts += connection.parts
        self._size += sum(map(len, connection.parts))
        connection.parts.clear()
        self._done = connection.complete
        if self._size > _HIGH_WATER and not self._done and not self._paused:
            self._paused = True
            connection.transport.pause_reading()
        self._wake.set()

    def read_passed(self, data: bytes, mark: int) -> None:
        raise AssertionError("a call never lets its connection pass")

    def broken(self, err: Exception) -> None:
        self._fail(ConnectionError(f"the answer is not HTTP: {err}"))
        self._connection.abort()

    def lost(self, exc: Exception | None) -> None:
        if self._connection.ended_by_close() and exc is None:
            self._done = True
            self._wake.set()
            return
        clean = self._connection.reused and not self._connection.head_raw and not self._connection.headers_done
        self._fail(UpstreamClosed(str(exc) if exc else "the other end closed the connection", clean=clean))

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def _fail(self, error: Exception) -> None:
        if not self._done and self._error is None:
            self._error = error
        self._wake.set()


def _is_numeric(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
