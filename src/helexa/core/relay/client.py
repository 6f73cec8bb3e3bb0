"""One client's connection: its requests one after the other, each refused, or handed to the relay or to the app."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

import httptools
import msgspec

from helexa.core.bodies import NOT_JSON, explain
from helexa.core.errors import (
    BadRequest,
    Dialect,
    HeadTooLarge,
    HelexaError,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    render,
    status_for,
)
from helexa.core.relay import wire
from helexa.core.relay.asgi import Cycle
from helexa.core.relay.contract import Director, Endpoint, Exchange, Peek
from helexa.core.relay.outbox import Write
from helexa.core.relay.relay import Pair

if TYPE_CHECKING:
    from helexa.core.relay.server import Server

_LINGER_S: Final = 2.0  # how long a refused upload is read and thrown away, so that its sender can read why
_BODY_GRACE_S: Final = 10.0
_CR: Final = 0x0D
_ANTHROPIC: Final = Dialect.ANTHROPIC  # an attribute of an Enum class takes ten times as long (Python 3.11)
_peek = msgspec.json.Decoder(Peek).decode


class ClientConnection(asyncio.Protocol):
    """One client's connection: requests one after the other.

    What a request is on its way: `_raw` until its head is whole, then `head`, then `_parts` of its body; then it
    belongs to `pair` (the relay) or `cycle` (the app) until `finished`.

    write: in this turn of the loop, in order, by way of the server's outbox
    put:   the transport's own, which is where the outbox writes
    """

    __slots__ = (
        "_announced",
        "_client_line",
        "_closing",
        "_complete",
        "_deadline",
        "_lower",
        "_parts",
        "_pipelined",
        "_rare",
        "_raw",
        "_refusal",
        "_size",
        "_t_head",
        "address",
        "cycle",
        "director",
        "head",
        "http11",
        "keep",
        "pair",
        "parser",
        "paused",
        "peer",
        "put",
        "server",
        "sockname",
        "transport",
        "write",
    )

    def __init__(self, server: Server) -> None:
        self.server = server
        self.director = cast("Director", server.director)  # never asked where there is none: no endpoint leads to it
        self.transport = cast("asyncio.Transport", None)
        self.put: Write = _nowhere
        self.write: Write = _nowhere
        self.peer: tuple[str, int] | None = None
        self.sockname: tuple[str, int] | None = None
        self.address = "unix"
        self._client_line = b"x-request-id: "
        self.pair: Pair | None = None
        self.cycle: Cycle | None = None
        self.keep = self.http11 = True
        self.paused = False  # it reads slower than we write
        self._closing = False
        self._t_head = 0.0
        self._next()
        self.parser = httptools.HttpRequestParser(self)

    def _next(self) -> None:
        """Ready for a request."""
        self.head = b""
        self._raw = b""
        self._lower = b""
        self._parts: list[bytes] = []
        self._size = 0
        self._announced = self._complete = self._pipelined = self._rare = False
        self._refusal: HelexaError | None = None
        self._deadline = monotonic() + self.server.timeouts.idle_s

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.put = self.transport.write
        self.write = partial(self.server.outbox.put, self.put)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer, self.address = (peer[0], peer[1]), peer[0]
            if not self.server.inside:  # the node queues fairly among the gateway's clients
                self._client_line = b"x-helexa-client: " + self.address.encode() + b"\r\nx-request-id: "
            own = transport.get_extra_info("sockname")
            self.sockname = (own[0], own[1])
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = self.server
        server.connections.add(self)
        server.by_address[self.address] += 1
        self._deadline = monotonic() + server.timeouts.head_s
        many = len(server.connections) > server.limits.connections
        if many or (self.address != "unix" and server.by_address[self.address] > server.limits.connections_per_address):
            whose = "in all" if many else f"from {self.address}"
            self._refuse(Overloaded(f"Too many connections {whose}; close some, or raise [limits]"))

    def data_received(self, data: bytes) -> None:
        if self.pair is not None or self.cycle is not None or self._closing:
            self._pipelined = True  # never served; what comes is thrown away, and the connection ends after the answer
            return
        if not self.head:
            if not self._raw:
                if data[0] <= _CR:  # RFC 9112, 2.2: an empty line before the request line
                    data = data.lstrip(b"\r\n")
                    if not data:
                        return
                self._t_head = monotonic()
                self._deadline = self._t_head + self.server.timeouts.head_s
            self._raw = self._raw + data if self._raw else data
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # seen in on_headers_complete
        except httptools.HttpParserError as err:
            self._refuse(self._refusal or BadRequest(f"Not a valid HTTP/1.1 request: {err}"))
            return
        if self.head and not self._complete and not self._announced and self._refusal is None:
            self._await_body()
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self._complete:
            self._dispatch()
        elif not self.head and len(self._raw) > wire.MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"The request's head is over {wire.MAX_HEAD_BYTES >> 10} kB"))

    def eof_received(self) -> bool | None:
        return None  # a client that closes its side is taken to have left, as nginx does

    def connection_lost(self, exc: Exception | None) -> None:
        server = self.server
        self._closing = True
        server.outbox.drop(self.put)
        server.connections.discard(self)
        server.by_address[self.address] -= 1
        if not server.by_address[self.address]:
            del server.by_address[self.address]
        if self.pair is not None:
            self.pair.client_gone()
        if self.cycle is not None:
            self.cycle.gone()
        self.write = _nowhere

    def pause_writing(self) -> None:
        self.paused = True
        if self.pair is not None:
            self.pair.client_paused()
        if self.cycle is not None:
            self.cycle.paused(True)

    def resume_writing(self) -> None:
        self.paused = False
        if self.pair is not None:
            self.pair.client_resumed()
        if self.cycle is not None:
            self.cycle.paused(False)

    # llhttp's calls. After a refusal it goes on parsing the same bytes, so each looks first.

    def on_message_begin(self) -> None:
        if self._complete:
            self._pipelined = True

    def on_headers_complete(self) -> None:
        if self._pipelined or self._refusal is not None:
            return
        parser = self.parser
        self.keep = parser.should_keep_alive()  # valid only inside callbacks
        raw = self._raw
        self.head = head = raw[: raw.find(b"\r\n\r\n") + 4]
        self._raw = b""
        end = head.find(b"\r\n")
        # asked of llhttp, it is a string made anew
        version = "1.1" if head[end - 9 : end] == b" HTTP/1.1" else parser.get_http_version()
        self.http11 = version == "1.1"
        self._lower = lower = head.lower()
        noted = wire.noted(lower)
        self._rare = noted != wire.PLAIN
        self._refusal = wire.refusal(head, lower, version, upgrade=parser.should_upgrade(), noted=noted)

    def _await_body(self) -> None:
        """The head is here and the body is not, or not all of it: is it welcome?"""
        self._announced = True
        length = wire.value_of(self.head, self._lower, b"content-length:")
        if length is not None and int(length) > self.server.body_limit:
            self._refusal = self._too_large(int(length))
        elif self._rare and b"\r\nexpect:" in self._lower and self.http11:
            self.write(wire.CONTINUE)

    def _too_large(self, size: int) -> HelexaError:
        limit = self.server.body_limit >> 20
        return RequestTooLarge(f"The body has {size} bytes or more; the limit is {limit} MB (body_limit_mb)")

    def on_body(self, body: bytes) -> None:
        if self._pipelined or self._refusal is not None:
            return
        self._parts.append(body)
        self._size += len(body)
        if self._size > self.server.body_limit:
            self._refusal = self._too_large(self._size)
            self._parts.clear()

    def on_message_complete(self) -> None:
        if not self._pipelined:
            self._complete = True

    # requests

    def _dispatch(self) -> None:
        server = self.server
        head = self.head
        space = head.index(b" ")
        method, target = head[:space], head[space + 1 : head.index(b" ", space + 1)]
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts = []
        given = wire.value_of(self.head, self._lower, b"x-request-id:") if self._rare else None
        request_id = given.decode() if given is not None and wire.good_request_id(given) else server.new_id()
        endpoint = None
        if method == b"POST":
            endpoint = server.endpoints.get(target) or server.endpoints.get(target.partition(b"?")[0])
        if endpoint is not None:
            self._relay(endpoint, body, request_id)
            return
        if server.app is None:
            self.respond_error(BadRequest("Nothing is served here but inference"), Dialect.OPENAI, request_id)
            self.finished(keep=False)
            return
        cycle = self.cycle = Cycle(self, head, method.decode(), target, body, request_id)
        task = asyncio.get_running_loop().create_task(cycle.run(server.app))
        server.tasks.add(task)
        task.add_done_callback(server.tasks.discard)

    def _relay(self, endpoint: Endpoint, body: bytes, request_id: str) -> None:
        """HOT, once per inference request."""
        server = self.server
        error: HelexaError | None = server.refusing
        model, stream, wants_usage, gateway_usage = "", False, False, False
        try:
            peek = _peek(body)
        except NOT_JSON as err:
            error = error or explain(err)
        else:
            model = peek.model or ""
            stream = peek.stream is True or (endpoint.streams and peek.stream is None)
            wants_usage = peek.stream_options is not None and peek.stream_options.include_usage is True
        extra = self._client_line + request_id.encode() + b"\r\n"
        lower = self._lower
        if self._rare and (trace := wire.value_of(self.head, lower, b"traceparent:")) is not None:
            extra += b"traceparent: " + trace + b"\r\n"
        if server.inside:
            named = wire.value_of(self.head, lower, b"x-helexa-model:")
            if named is not None:
                model = named.decode("utf-8", "replace")
            gateway_usage = wire.value_of(self.head, lower, b"x-helexa-usage:") == b"1"
        exchange = Exchange(
            endpoint,
            self.head,
            body,
            model,
            stream,
            wants_usage,
            gateway_usage,
            request_id,
            self.address,
            monotonic(),
        )
        pair = self.pair = Pair(self, exchange, extra)
        server.inflight += 1
        if error is None and not model:
            error = BadRequest("`model` is missing: name one of GET /v1/models", param="model")
        if error is not None:
            pair.fail(error)
        else:
            pair.attempt()

    def respond_error(self, error: HelexaError, dialect: Dialect, request_id: str) -> int:
        """A whole error response in the dialect; its status."""
        status = status_for(error, dialect)
        body = render(error, dialect, request_id)
        head = wire.status_line(status) + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        if error.retry_after_s is not None:
            head += b"retry-after: %d\r\n" % error.retry_after_s
        self.write(head + self.own_headers(request_id, dialect) + body)
        return status

    def own_headers(self, request_id: str, dialect: Dialect | None) -> bytes:
        """The header lines that every response of ours has, and the blank line."""
        rid = request_id.encode()
        lines = b"x-request-id: " + rid + b"\r\n" + self.server.date_line
        if dialect is _ANTHROPIC:
            lines += b"request-id: " + rid + b"\r\n"
        if dialect is not None and self.server.cors_origins and b"\r\norigin:" in self._lower:
            lines += self._cors()
        if not self.keep or self._pipelined:
            return lines + b"connection: close\r\n\r\n"
        return lines + b"\r\n" if self.http11 else lines + b"connection: keep-alive\r\n\r\n"

    def _cors(self) -> bytes:
        origin = wire.value_of(self.head, self._lower, b"origin:") or b""
        allowed = self.server.cors_origins
        if b"*" in allowed:
            return b"access-control-allow-origin: *\r\naccess-control-expose-headers: x-request-id\r\n"
        if origin in allowed:
            return (
                b"access-control-allow-origin: " + origin + b"\r\nvary: origin\r\n"
                b"access-control-expose-headers: x-request-id\r\n"
            )
        return b""

    def _refuse(self, error: HelexaError) -> None:
        """Before any request could be made of it: the answer, then the end, after what is still being sent."""
        if self._closing:
            return
        self.keep = False
        self.respond_error(error, self._dialect_of_head(), self.server.new_id())
        self._closing = True
        self._deadline = monotonic() + _LINGER_S
        self.server.outbox.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _dialect_of_head(self) -> Dialect:
        target = self.head.split(b"\r\n", 1)[0].split(b" ")
        endpoint = self.server.endpoints.get(target[1].partition(b"?")[0]) if len(target) > 1 else None
        return endpoint.dialect if endpoint is not None else Dialect.OPENAI

    def finished(self, *, keep: bool) -> None:
        """The request is answered, or cut; what came next on the wire decides with `keep` about the connection."""
        if self.pair is not None:
            self.pair = None
            self.server.pair_ended()
        self.cycle = None
        if self._closing:
            return
        if keep and self.keep and not self._pipelined:
            self._next()
        else:
            self.shut()

    def shut(self) -> None:
        """Close once what was written is out."""
        if not self._closing:
            self._closing = True
            self._deadline = monotonic() + _LINGER_S
            self.server.outbox.flush()
            self.transport.close()

    def abort(self) -> None:
        self._closing = True
        self.server.outbox.flush()  # what was written before the cut comes before it
        if self.transport is not None:
            self.transport.abort()

    def sweep(self, now: float) -> None:
        """Once a second: deadlines."""
        if self.pair is not None:
            self.pair.sweep(now)
        elif self.cycle is not None:
            return
        elif self._closing:
            if now > self._deadline:
                self.transport.abort()
        elif self.head and not self._complete:
            since = now - self._t_head
            if since > _BODY_GRACE_S and self._size < since * self.server.timeouts.body_min_rate:
                rate = self.server.timeouts.body_min_rate
                self._refuse(RequestTimeout(f"The body came slower than {rate} bytes/s; send it faster"))
        elif now > self._deadline:
            if self._raw:
                self._refuse(RequestTimeout(f"The head did not come within {self.server.timeouts.head_s:g} s"))
            else:
                self.shut()


def _nowhere(data: bytes) -> None:
    """Writes of a connection that is gone."""
