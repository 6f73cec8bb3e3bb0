"""One connection to an upstream, and where in a response it stands.

It serves one response at a time and belongs to its `owner` meanwhile. Bytes that nobody asked for mean that both ends
disagree about where a response ended: such a connection is closed, never used again.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from helexa.core.relay.outbox import MOST, Outbox, Write

if TYPE_CHECKING:
    from helexa.core.relay.upstream import Upstream

EVENT_END = b"\n\n\r\n"  # of the last event in a chunk, and of that chunk
MAX_HEAD_BYTES = 64 << 10
# Length of a read that is one whole chunk -> the size line that it then begins with. Strict, as llhttp is: no sign, no
# space, no leading zero; a sender who writes capitals, or larger chunks, is read by llhttp.
_SIZE_LINES = {len(line) + size + 2: line for size in range(1, 2048) for line in [b"%x\r\n" % size]}


class UpstreamClosed(ConnectionError):
    """The other end closed before the answer was whole. `clean`: a reused connection, not one byte came."""

    def __init__(self, message: str, *, clean: bool = False) -> None:
        super().__init__(message)
        self.clean = clean


class Owner(Protocol):
    """Who a connection works for. Calls come from the loop; none may block."""

    def read(self, data: bytes) -> None: ...
    def read_passed(self, data: bytes, mark: int) -> None:
        """While the connection passes: a read that it could not pass, fed already; its parts are `parts[mark:]`."""

    def broken(self, err: Exception) -> None: ...
    def lost(self, exc: Exception | None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Connection(asyncio.Protocol):
    """One connection, and where in a response it stands.

    parts:     decoded body bytes of the reads since the owner last took them; while it passes, whole reads among them
    in_chunk:  in the data of a chunk
    passing:   whole events go to `write` in the turn in which they come, and the owner is not asked; parts then keeps
               the last of them
    heed:      bytes in whose read the passing ends; b"" for none
    reads:     reads of this response
    served:    it has carried a whole response
    framed:    the head announced a length or chunks; set by the owner, which reads the head
    """

    __slots__ = (
        "__weakref__",
        "closed",
        "complete",
        "feed_data",
        "framed",
        "head",
        "head_raw",
        "headers_done",
        "heed",
        "held",
        "in_chunk",
        "interim",
        "keep",
        "outbox",
        "owner",
        "parser",
        "parts",
        "passing",
        "pool",
        "put",
        "reads",
        "rest",
        "reused",
        "served",
        "status",
        "transport",
        "write",
    )

    def __init__(self, pool: Upstream) -> None:
        self.pool = pool
        self.outbox: Outbox | None = None
        self.held: list[tuple[Write, bytes]] = []
        self.owner: Owner | None = None
        self.transport = cast("asyncio.Transport", None)
        self.put = cast("Write", None)
        self.closed = False
        self.reused = self.served = False
        self.parts: list[bytes] = []
        self._reset()
        self.parser = httptools.HttpResponseParser(self)
        self.feed_data = self.parser.feed_data

    def _reset(self) -> None:
        self.status = 0
        self.head = b""
        self.head_raw = b""
        self.rest = b""
        self.headers_done = self.complete = self.in_chunk = self.interim = self.keep = self.framed = False
        self.passing = False
        self.heed = b""
        self.reads = 0
        self.write: Write | None = None
        self.parts.clear()

    def ask(self, request: bytes, outbox: Outbox) -> None:
        """HOT, once per request: one write, in this turn of the loop. outbox: of the server that the answer goes to."""
        self.outbox, self.held = outbox, outbox.held
        outbox.put(self.put, request)

    def start_passing(self, write: Write, heed: bytes) -> None:
        """From a point between two events and two chunks on: reads that hold whole events go to `write`, by way of the
        outbox."""
        self.write, self.heed, self.passing = write, heed, True

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.put = self.transport.write
        self.pool.opened(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # the stdlib loop sets it only where the socket's proto says TCP; first tokens are 41 ms late without
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        # HOT, once per read: one write, in this turn; no task, timer, clock, JSON or log line. Bench: bench/gateway.
        self.reads += 1
        if not self.passing:
            if self.owner is None:
                self.abort()
            else:
                self.owner.read(data)
            return
        # Passing begins with an owner and a write, and ends before either goes: not asked again for every chunk.
        parts = self.parts
        # Most reads are one whole chunk. llhttp would stand behind it as it stood before, and is not shown it.
        # Slices: endswith takes twice as long to parse its arguments (Python 3.11). partition: `in` raises and catches
        # a TypeError for every pair of bytes, which takes as long as the search itself.
        size_line = _SIZE_LINES.get(len(data))
        if (
            size_line is not None
            and data[: len(size_line)] == size_line
            and data[-4:] == EVENT_END
            and not (self.heed and data.partition(self.heed)[1])
        ):
            held = self.held
            if 0 < len(held) < MOST:
                held.append((self.write, data))  # type: ignore[arg-type]
            else:
                self.outbox.put(self.write, data)  # type: ignore[union-attr, arg-type]
            parts.append(data)
            # Few are kept, since memory that was freed just now is still in the cache.
            if len(parts) > 16:
                del parts[:-8]
            return
        mark = len(parts)
        try:
            self.feed_data(data)  # llhttp validates, and calls on_body and on_chunk_complete
        except httptools.HttpParserError as err:
            self.owner.broken(err)  # type: ignore[union-attr]
            return
        # A read may end inside a chunk, or inside the next one's size line, which llhttp has not told of yet.
        if not self.in_chunk and data.endswith(EVENT_END) and not (self.heed and data.partition(self.heed)[1]):
            self.outbox.put(self.write, data)  # type: ignore[union-attr, arg-type]
            if mark > 16:
                del parts[:-8]  # what the end of a stream is told from
        else:
            self.passing = False
            self.owner.read_passed(data, mark)  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.outbox is not None:
            self.outbox.drop(self.put)
        self.pool.dropped(self)
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.lost(exc)

    def pause_writing(self) -> None:
        if self.owner is not None:
            self.owner.pause()

    def resume_writing(self) -> None:
        if self.owner is not None:
            self.owner.resume()

    # llhttp's calls

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        if 100 <= self.status < 200:
            self.interim = True
            return
        self.headers_done = True
        self.keep = self.parser.should_keep_alive()  # valid only inside callbacks

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)
        self.in_chunk = True

    def on_chunk_complete(self) -> None:
        self.in_chunk = False

    def on_message_complete(self) -> None:
        if self.interim:
            self.interim = False
            return
        self.complete = True

    # for owners

    def feed(self, data: bytes) -> None:
        """One read through llhttp. Raises httptools.HttpParserError, and UpstreamClosed for bytes after the end."""
        if self.complete:
            raise UpstreamClosed("bytes after the end of a response")
        if self.headers_done:
            self.parser.feed_data(data)
            return
        self.head_raw += data
        self.parser.feed_data(data)
        if self.headers_done:
            raw = self.head_raw
            end = raw.index(b"\r\n\r\n")
            while raw.startswith(b"HTTP/1.1 1"):
                raw = raw[end + 4 :]
                end = raw.index(b"\r\n\r\n")
            self.head, self.rest, self.head_raw = raw[: end + 4], raw[end + 4 :], b""
        elif len(self.head_raw) > MAX_HEAD_BYTES:
            raise UpstreamClosed("a response head of over 64 kB")

    def ended_by_close(self) -> bool:
        """The connection closed, and that was the end of the body: no length and no chunks were announced."""
        return self.headers_done and not self.framed

    def release(self) -> None:
        """Give it back after a complete response; closed where it cannot be used again."""
        self.owner = None
        if self.closed or not self.keep or not self.complete or self.pool.closing:
            self.transport.close()
            return
        self._reset()
        self.served = True
        self.pool.give_back(self)

    def abort(self) -> None:
        self.owner = None
        self.passing = False
        if not self.closed:
            if self.outbox is not None:
                self.outbox.drop(self.put)
            self.transport.abort()
