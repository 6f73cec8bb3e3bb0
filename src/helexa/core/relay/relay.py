"""One exchange from its request to its last byte: attempts, the held head, heartbeats, bytes through, and every end.

The states of the answer, in order; what may still happen in each:

    WAITING   no upstream yet (a load, a queue), or one that is being connected to     retry, heartbeat, error body
    ASKED     the request went out; no head came                                       retry, heartbeat, error body
    ERROR     the upstream answers >= 400: its body is collected                       retry, error body or event
    STREAM    events; before the first one that is no comment nothing is committed     retry, heartbeat, error event
    WHOLE     one piece, passed as it comes                                            error: the connection is cut
    OVER      released and counted

A stream is read carefully (event by event, framed anew) until its first token, where a read does not end with a whole
event, and from the event on that must not pass as it is; in between, a read is passed as it came. Raw bytes are only
ever passed from and to a point between chunks and between events, so that an event of ours (heartbeat, error) fits at
any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import httptools
import msgspec

from helexa.core import logs, sse
from helexa.core.errors import Dialect, HelexaError, Transient, UpstreamError, UpstreamTimeout, render_event
from helexa.core.relay import scan, wire
from helexa.core.relay.connection import EVENT_END, Connection, UpstreamClosed
from helexa.core.relay.contract import Exchange, Reply, Route
from helexa.core.relay.events import DONE, Events

if TYPE_CHECKING:
    from helexa.core.relay.client import ClientConnection

MAX_ATTEMPTS: Final = 3  # the first and two other replicas
MAX_ERROR_BODY: Final = 256 << 10
HEARTBEAT_AFTER_S: Final = 1.0

_PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
_log = logs.get("relay")


class Phase(Enum):
    WAITING = "waiting"
    ASKED = "asked"
    ERROR = "error"
    STREAM = "stream"
    WHOLE = "whole"
    OVER = "over"


# The members by names of our own: an attribute of an Enum class takes ten times as long (Python 3.11).
_WAITING, _ASKED, _ERROR, _STREAM, _WHOLE, _OVER = Phase


class Pair:
    """A client's exchange and the upstream connection that works for it, if any. Owner of that connection.

    committed:  the client saw something of an answer; no other attempt may follow
    """

    __slots__ = (
        "_again",
        "_body",
        "_chunked",
        "_done_seen",
        "_events",
        "_extra",
        "_heed",
        "_held_head",
        "_mend",
        "_paused_since",
        "_raw_ok",
        "_reads_seen",
        "_t_read",
        "_tail",
        "_task",
        "_translates",
        "_wrote",
        "attempts",
        "client",
        "committed",
        "connection",
        "director",
        "exchange",
        "head_sent",
        "phase",
        "route",
        "write",
    )

    def __init__(self, client: ClientConnection, exchange: Exchange, extra: bytes) -> None:
        self.client = client
        self.exchange = exchange
        self.director = client.director
        self.write = client.write
        self.route: Route | None = None
        self.connection: Connection | None = None
        self.phase = _WAITING
        self.attempts = 0
        self.committed = self.head_sent = False
        self._extra = extra  # header lines of the client's that go upstream
        self._task: asyncio.Task[None] | None = None
        self._again = False  # the silent retry on the same upstream is spent
        self._chunked = client.http11
        self._wrote = False
        self._paused_since = monotonic() if client.paused else 0.0
        self._reads_seen = -1
        self._t_read = 0.0
        self._fresh()

    def _fresh(self) -> None:
        """Nothing is known of an answer."""
        self._body: list[bytes] = []
        self._events: Events | None = None
        self._held_head = b""
        self._tail: list[bytes] = []
        self._raw_ok = self._done_seen = False
        self._heed = b""
        self._mend: Any = None
        self._translates = False

    # attempts

    def attempt(self) -> None:
        """Ask the director where to go, and go."""
        self.phase = _WAITING
        self.attempts += 1
        self.exchange.error = None  # a failed attempt that another one makes good is no failed request
        try:
            chosen = self.director.route(self.exchange)
        except HelexaError as error:
            self.fail(error)
            return
        except Exception as err:
            self._route_failed(err)
            return
        if isinstance(chosen, Route):
            self._use(chosen)
        elif isinstance(chosen, Reply):
            self._reply(chosen)
        else:
            self._task = asyncio.get_running_loop().create_task(self._wait(chosen))

    async def _wait(self, chosen: Awaitable[Route | Reply]) -> None:
        try:
            route = await chosen
        except HelexaError as error:
            self._task = None
            self.fail(error)
        except Exception as err:
            self._task = None
            self._route_failed(err)
        else:
            self._task = None
            if isinstance(route, Reply):
                self._reply(route)
            else:
                self._use(route)

    def _route_failed(self, err: Exception) -> None:
        """A fault of the director's own, told all the same: without an answer the client would ask again and again."""
        _log.exception("route failed", request_id=self.exchange.request_id, model=self.exchange.model)
        self.fail(HelexaError(f"No place was found for {self.exchange.model}, by a fault of the gateway's: {err!r}"))

    def _reply(self, reply: Reply) -> None:
        if self.phase is _OVER:
            return
        if self.head_sent:  # heartbeats went out: their head said how the body is framed
            self._emit(reply.body)
            self._finish(raw_end=False)
            return
        length = b"content-length: %d\r\n" % len(reply.body)
        head = wire.STATUS_LINES[200] + b"content-type: " + reply.content_type + b"\r\n" + length
        self._send_head(head, reply.body)
        self._finish(raw_end=True)

    def _use(self, route: Route) -> None:
        self.route = route
        self.exchange.node = route.upstream.name
        if self.phase is _OVER:  # the client left in the very moment that the route came
            self._release()
            return
        connection = route.upstream.try_take()
        if connection is not None:
            self._ask(connection)
        else:
            self._task = asyncio.get_running_loop().create_task(self._connect(route))

    async def _connect(self, route: Route) -> None:
        upstream = route.upstream
        try:
            connection = await upstream.open()
        except TimeoutError:
            self._task = None
            self._attempt_failed(
                UpstreamTimeout(f"{upstream.name} did not accept a connection in {upstream.connect_s:g} s")
            )
        except OSError as err:
            self._task = None
            reason = err.strerror or str(err) or type(err).__name__
            self._attempt_failed(UpstreamError(f"{upstream.name} cannot be reached: {reason}"))
        else:
            self._task = None
            if self.phase is _OVER:
                connection.abort()
            else:
                self._ask(connection)

    def _ask(self, connection: Connection) -> None:
        """HOT, once per request: one write."""
        route = self.route
        assert route is not None
        exchange = self.exchange
        body = exchange.body if route.body is None else route.body
        self.connection = connection
        connection.owner = self
        self.phase = _ASKED
        self._t_read = 0.0
        if self._paused_since:
            connection.transport.pause_reading()
        parts = (
            route.upstream.head_for(route.path or exchange.endpoint.upstream_path),
            b"%d\r\n" % len(body),
            route.headers,
            self._extra,
            b"\r\n",
            body,
        )
        connection.ask(b"".join(parts), self.client.server.outbox)

    # the upstream's bytes

    def read(self, data: bytes) -> None:
        """Heads, errors, answers in one piece, and streams that are read event by event."""
        connection = self.connection
        if connection is None:
            return
        exchange = self.exchange
        had_head = connection.headers_done
        try:
            connection.feed(data)
        except (httptools.HttpParserError, UpstreamClosed) as err:
            self.broken(err)
            return
        if not connection.headers_done:
            return
        if not had_head:
            data = connection.rest
            self._begin_answer(connection)
        parts = connection.parts
        part = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if part and not exchange.t_first_byte:
            exchange.t_first_byte = monotonic()
        if self.phase is _STREAM:
            self._stream(connection, part, data)
        elif self.phase is _WHOLE:
            self._whole(connection, data, part)
        elif self.phase is _ERROR:
            self._body.append(part)
            if connection.complete or sum(map(len, self._body)) > MAX_ERROR_BODY:
                self._upstream_refused(connection)

    def read_passed(self, data: bytes, mark: int) -> None:
        """A read with half an event, with usage, or with the end."""
        connection = self.connection
        assert connection is not None
        parts = connection.parts
        scan.settle_stream(self.exchange, b"".join(parts[max(0, mark - 8) : mark]))
        part = b"".join(parts[mark:])
        parts.clear()
        self._stream(connection, part, data)

    def _let_go(self) -> Connection | None:
        """The connection is no longer ours; what it passed last is read for what it tells."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self.exchange.reads += connection.reads
            if self._paused_since and not connection.closed:
                connection.transport.resume_reading()  # kept for the next request, it must hear its answer
            if connection.passing:
                connection.passing = False
                last = b"".join(connection.parts[-8:])
                scan.settle_stream(self.exchange, last)
                # passing may have begun behind the [DONE] that was read by event
                self._done_seen = self._done_seen or last.rstrip().endswith(DONE)
        return connection

    def _begin_answer(self, connection: Connection) -> None:
        """The head is complete: which kind of answer is it?"""
        route = self.route
        assert route is not None
        self._mend = route.mend
        self._translates = route.translates
        head, kind, length, chunked = wire.answer_head(connection.head)
        connection.framed = chunked or length is not None
        self._held_head = head if route.content_type is None else wire.with_content_type(head, route.content_type)
        if connection.status >= 400:
            self.phase = _ERROR
        elif self.exchange.stream and kind.startswith(b"text/event-stream"):
            self.phase = _STREAM
            cut = route.cut_usage and not self.exchange.wants_usage
            self._heed = scan.USAGE if cut else scan.FINISH if route.stop_reason else b""
            self._events = Events(
                self.exchange,
                cut_usage=cut,
                cut_progress=route.cut_progress,
                first_event=route.first_event,
                stop_reason=route.stop_reason,
            )
            self._raw_ok = self._chunked and self._mend is None and chunked
        elif self.head_sent:
            connection.abort()
            self._attempt_failed(UpstreamError(f"{route.upstream.name} answered a stream request with no stream"))
        else:
            self.phase = _WHOLE
            self._raw_ok = self._mend is None and (length is not None or (chunked and self._chunked))
            if self._raw_ok:
                self._held_head += (
                    b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %b\r\n" % length
                )

    # an answer in one piece

    def _whole(self, connection: Connection, data: bytes, part: bytes) -> None:
        if not self._raw_ok:  # mended, or for a client that cannot read chunks: collected, sent with its length
            collected = self._mended(connection, part)
            if collected is None:
                return
            self._body.append(collected)
            if connection.complete:
                body = b"".join(self._body)
                self._tail.append(body)
                self._send_head(self._held_head + b"content-length: %d\r\n" % len(body), body)
                self.committed = True
                self._finish(raw_end=True)
            return
        self._tail.append(part)
        del self._tail[:-8]
        if not self.head_sent:
            if not data and not connection.complete:
                return
            self._send_head(self._held_head, data)
        elif data:
            self.write(data)
        self.committed = True
        if connection.complete:
            self._finish(raw_end=True)

    def _mended(self, connection: Connection, part: bytes) -> bytes | None:
        """`part` through the mend, if there is one. None: it ended the attempt."""
        if self._mend is None:
            return part
        try:
            out: bytes = self._mend.feed(part) if part else b""
            return out + self._mend.finish() if connection.complete else out
        except HelexaError as error:
            connection.abort()
            if isinstance(error, Transient | UpstreamError | UpstreamTimeout):
                self._attempt_failed(error)
            else:
                self.fail(error)  # the same on every node
            return None

    # a stream, event by event

    def _stream(self, connection: Connection, part: bytes, raw: bytes) -> None:
        """part: the decoded body bytes of the read `raw`."""
        mended = self._mended(connection, part)
        if mended is None:
            return
        if self._translates:  # HOT: whole events, and nothing of them is ours to read
            if mended:
                self.committed = True
                self._emit(mended)
            if connection.complete:
                self._finish(raw_end=False)
            return
        events = self._events
        assert events is not None
        payload = events.feed(mended, last=connection.complete)
        if events.early_error is not None:
            if self._moved_on(events.early_error):
                return
            payload += events.go_on(last=connection.complete)
        self.committed = self.committed or events.committed
        self._done_seen = events.done_seen
        if payload:
            self._emit(payload)
        if connection.complete:
            self._finish(raw_end=False)
        elif len(events.pending) > sse.MAX_EVENT_BYTES:
            connection.abort()
            self._attempt_failed(
                UpstreamError(f"{self.exchange.node} sent an event of over {sse.MAX_EVENT_BYTES} bytes")
            )
        elif self._raw_ok and events.may_pass and not connection.in_chunk and raw.endswith(EVENT_END):
            connection.start_passing(self.client.put, self._heed)

    def _moved_on(self, told: Any) -> bool:
        """An upstream whose own head was out already can only say in an event that it failed."""
        route = self.route
        assert route is not None
        error = self.director.refused(self.exchange, route, 503, msgspec.json.encode({"error": told}))
        if not isinstance(error, Transient | UpstreamError):
            return False
        if self.connection is not None:
            self.connection.abort()
        self._attempt_failed(error)
        return True

    def _emit(self, payload: bytes) -> None:
        self._wrote = True
        framed = wire.chunk(payload) if self._chunked else payload
        if self.head_sent:
            self.write(framed)
        else:
            self._send_head(self._stream_head(), framed)

    def _stream_head(self) -> bytes:
        head = self._held_head or wire.STATUS_LINES[200] + wire.STREAM_HEADERS
        return head + b"transfer-encoding: chunked\r\n" if self._chunked else head

    def _send_head(self, head: bytes, first: bytes) -> None:
        """Our head and the first bytes leave in one write."""
        self.head_sent = True
        self.exchange.status = int(head[9:12])
        if not self._chunked and b"content-length:" not in head:
            self.client.keep = False  # an end by close is the only framing that 1.0 knows
        exchange = self.exchange
        own = self.client.own_headers(exchange.request_id, exchange.endpoint.dialect)
        self.write(head + exchange.headers_back + own + first)

    # ends

    def _finish(self, *, raw_end: bool) -> None:
        """The answer is whole. raw_end: its end went out with the bytes."""
        exchange = self.exchange
        if self.phase is _WHOLE and not self._translates:
            tail = b"".join(self._tail)
            if exchange.endpoint.generates or b'"usage"' in tail:
                scan.settle_whole(exchange, tail)
        if not raw_end:
            if not self.head_sent:  # a stream without a single event
                self._send_head(self._stream_head(), b"")
            if self._chunked:
                self.write(wire.LAST_CHUNK)
        connection = self._let_go()
        if connection is not None:
            connection.release()
        self._over(keep=True)

    def _upstream_refused(self, connection: Connection) -> None:
        """The upstream answered >= 400 and its body is here (at most MAX_ERROR_BODY of it)."""
        route = self.route
        assert route is not None
        body = b"".join(self._body)
        status = connection.status
        self._let_go()
        connection.release()
        error = self.director.refused(self.exchange, route, status, body)
        if isinstance(error, Transient | UpstreamError | UpstreamTimeout):
            self._attempt_failed(error)
        elif error is not None:
            self.fail(error)
        elif self.head_sent:
            self._emit(sse.frame(b" ".join(body.split(b"\n"))))
            self.exchange.error = UpstreamError(f"{route.upstream.name} answered {status}")
            self._end_stream()
        else:
            self.exchange.error = UpstreamError(f"{route.upstream.name} answered {status}")
            self._send_head(self._held_head + b"content-length: %d\r\n" % len(body), body)
            self._over(keep=True)

    def broken(self, err: Exception) -> None:
        """The upstream's bytes are not HTTP."""
        connection = self._let_go()
        if connection is not None:
            connection.abort()
        self._attempt_failed(UpstreamError(f"{self.exchange.node} sent what is not HTTP: {err}"))

    def lost(self, exc: Exception | None) -> None:
        """The upstream's connection is gone before its answer was whole."""
        connection = self._let_go()
        if connection is None or self.phase is _OVER:
            return
        route = self.route
        assert route is not None
        if connection.reused and not connection.head_raw and not connection.headers_done and not self._again:
            self._again = True  # kept alive by us, closed by it, just now: not a failure of the node
            self.phase = _WAITING
            self._task = asyncio.get_running_loop().create_task(self._connect(route))
            return
        if exc is None and connection.ended_by_close():
            connection.complete = True
            self.connection = connection
            if self.phase is _STREAM:
                self._stream(connection, b"", b"")
            elif self.phase is _WHOLE:
                self._whole(connection, b"", b"")
            else:
                self._upstream_refused(connection)
            return
        told = self._translates and self.exchange.finish_reason is not None
        if told or self._done_seen:
            self._finish(raw_end=False)  # nothing was lost but the last chunk
            return
        reason = f": {exc}" if exc is not None else ""
        self._attempt_failed(
            UpstreamError(f"{route.upstream.name} closed the connection before its answer was whole{reason}")
        )

    def _attempt_failed(self, error: HelexaError) -> None:
        """Another attempt where nothing is committed, else the end in the dialect."""
        if self.phase is _OVER:
            return
        self._let_go()
        route = self.route
        assert route is not None
        exchange = self.exchange
        mid_stream = self.committed
        exchange.error = error
        self.director.failed(exchange, route, error, mid_stream=mid_stream)
        exchange.tried.append(route.upstream.name)
        if not mid_stream and self.attempts < MAX_ATTEMPTS:
            self._release()
            self._fresh()
            self._again = False
            self.attempt()
            return
        self.fail(error)

    def fail(self, error: HelexaError) -> None:
        """The end, told in the caller's dialect: as a body while that is possible, else as the last event."""
        if self.phase is _OVER:
            return
        exchange = self.exchange
        exchange.error = error
        if not self.head_sent:
            exchange.status = self.client.respond_error(error, exchange.endpoint.dialect, exchange.request_id)
            self._over(keep=True)
            return
        if self.phase is _WHOLE:
            self.client.abort()  # no event fits, and no length can be taken back
            self._over(keep=False)
            return
        if exchange.last_words is not None:
            payload = exchange.last_words(error)
        else:
            payload = render_event(error, exchange.endpoint.dialect, exchange.request_id)
        self.write(wire.chunk(payload) if self._chunked else payload)
        self._end_stream()

    def _end_stream(self) -> None:
        """After an error event: the last chunk and the end of the connection, never a fake [DONE]."""
        if self._chunked:
            self.write(wire.LAST_CHUNK)
        self._over(keep=False)

    def client_gone(self) -> None:
        """The client left: its generation is cancelled with it."""
        if self.phase is _OVER:
            return
        exchange = self.exchange
        connection = self._let_go()
        if connection is not None:
            connection.abort()
        # Clients hang up on [DONE], or on an error event, before the last chunk has come: those have their answer.
        exchange.client_gone = exchange.finish_reason is None and exchange.error is None
        if not self.head_sent:
            exchange.client_gone = True
            exchange.status = 499
        self._over(keep=False)

    def _release(self) -> None:
        route, self.route = self.route, None
        if route is not None:
            self.director.released(self.exchange, route)

    def _over(self, *, keep: bool) -> None:
        if self.phase is _OVER:
            return
        self.phase = _OVER
        connection = self._let_go()
        if connection is not None:
            connection.abort()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._release()
        self.exchange.t_end = monotonic()
        self.director.done(self.exchange)
        self.client.finished(keep=keep)

    # flow control, and the sweeper

    def client_paused(self) -> None:
        self._paused_since = monotonic()
        if self.connection is not None and not self.connection.closed:
            self.connection.transport.pause_reading()

    def client_resumed(self) -> None:
        self._paused_since = 0.0
        if self.connection is not None and not self.connection.closed:
            self.connection.transport.resume_reading()

    def pause(self) -> None:
        """The upstream is full of our request; nothing more is to be sent, so nothing is to be held back."""

    def resume(self) -> None:
        pass

    def sweep(self, now: float) -> None:
        """Once a second: heartbeats, stalls, and clients that read nothing."""
        timeouts = self.client.server.timeouts
        exchange = self.exchange
        if self._paused_since:
            if now - self._paused_since > timeouts.stall_s:
                self.client.abort()
                self.client_gone()
            return
        if exchange.stream and not self.committed and now - exchange.t_start >= HEARTBEAT_AFTER_S:
            self._heartbeat()
        if self.connection is None:
            return
        if self.connection.reads != self._reads_seen or not self._t_read:
            self._reads_seen, self._t_read = self.connection.reads, now
            return
        silent_s = now - self._t_read
        route = self.route
        assert route is not None
        limit_s = timeouts.first_byte_s
        if limit_s is not None and not exchange.t_first_byte and silent_s > limit_s:
            self._stalled(f"{exchange.node} sent nothing for {limit_s:g} s")
        elif silent_s >= timeouts.stall_s and self.director.is_stalled(exchange, route, silent_s):
            self._stalled(f"{exchange.node} stalled: nothing came from {exchange.model} for {silent_s:.0f} s")

    def _stalled(self, message: str) -> None:
        connection = self._let_go()
        if connection is not None:
            connection.abort()
        self._attempt_failed(UpstreamTimeout(message))

    def _heartbeat(self) -> None:
        if self.phase in (_WHOLE, _ERROR, _OVER):
            return
        if self._wrote:  # the upstream's own comment went through since the last sweep
            self._wrote = False
            return
        dialect = self.exchange.endpoint.dialect
        if dialect is Dialect.OLLAMA:
            return
        text = (self.director.progress(self.exchange) if self.phase is _WAITING else None) or b""
        if self.exchange.heartbeat is not None:
            self._emit(self.exchange.heartbeat(text))
        else:
            self._emit(_PING if dialect is Dialect.ANTHROPIC else sse.comment(text))
        self._wrote = False
