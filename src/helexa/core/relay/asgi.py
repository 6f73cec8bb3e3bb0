"""The control plane on the relay's own port: one request of ours as one call of an ASGI application.

Cold by intent: a task per request. The body is read whole before the call (the server bounds it); the answer goes out
as it comes, with back-pressure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from helexa.core import logs
from helexa.core.errors import Dialect, HelexaError
from helexa.core.relay import wire

if TYPE_CHECKING:
    from helexa.core.relay.client import ClientConnection

Message = MutableMapping[str, Any]
ASGIApp = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"x-request-id"})
_log = logs.get("http")


class Cycle:
    """One request to the application. Ends with `client.finished`, whatever the application does."""

    def __init__(
        self, client: ClientConnection, head: bytes, method: str, target: bytes, body: bytes, rid: str
    ) -> None:
        self.client = client
        self.request_id = rid
        self.method = method
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._status = 0
        self._head: bytes | None = None
        self._chunked = self._head_out = self._ended = False
        path, _, query = target.partition(b"?")
        if b"://" in path:  # absolute form: what a proxy is sent
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
        headers = []
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name:
                headers.append((name.lower(), value.strip()))
        self.scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1" if client.http11 else "1.0",
            "method": method,
            "scheme": "http",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": client.peer,
            "server": client.sockname,
            "state": {"request_id": rid},
        }

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("request failed", method=self.method, path=self.scope["path"], request_id=self.request_id)
            if not self._head_out:
                self.client.respond_error(
                    HelexaError("Something went wrong here; the log has the details under this request's id"),
                    Dialect.OPENAI,
                    self.request_id,
                )
                self.client.finished(keep=True)
                return
            self.client.abort()
        if not self._ended and not self._gone.is_set():
            self.client.abort()
        self.client.finished(keep=self._ended)

    def gone(self) -> None:
        """The client left."""
        self._gone.set()
        self._writable.set()

    def paused(self, paused: bool) -> None:
        if paused:
            self._writable.clear()
        else:
            self._writable.set()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            raise ConnectionResetError("the client left")
        if message["type"] == "http.response.start":
            self._start(message)
            return
        body: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        if self.method == "HEAD":
            body = b""
        out = wire.chunk(body) if self._chunked else body
        if not more and self._chunked:
            out += wire.LAST_CHUNK
        if self._head is not None:
            out, self._head, self._head_out = self._head + out, None, True
        if out:
            self.client.write(out)
        self._ended = not more
        if more and not self._writable.is_set():
            await self._writable.wait()

    def _start(self, message: Message) -> None:
        self._status = message["status"]
        lines = []
        sized = False
        for name, value in message.get("headers", ()):
            lower = bytes(name).lower()
            if lower in _HOP_BY_HOP:
                continue
            sized = sized or lower == b"content-length"
            lines.append(bytes(name) + b": " + bytes(value) + b"\r\n")
        bodiless = self._status in (204, 304) or self.method == "HEAD"
        if not sized and not bodiless:
            if self.client.http11:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.client.keep = False
        self._head = wire.status_line(self._status) + b"".join(lines) + self.client.own_headers(self.request_id, None)
