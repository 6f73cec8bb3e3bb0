"""GET /events: what changes on this node, as it changes, to whoever listens.

A subscriber first gets a snapshot, then each change with a number of its own, and a comment when nothing happened for
a while. Publishing never waits: an event is encoded once, handed to everybody's bounded backlog, and who does not
read its own is cut off (it connects again, and gets a snapshot). All calls come from the daemon's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from helexa.core import sse

COMMENT_S: Final = 5.0
PROGRESS_S: Final = 0.25  # a load reports far more often than anybody can look
BACKLOG: Final = 256  # events; a snapshot and every model of a large node twice over
SEND_S: Final = 15.0  # who takes nothing for three comments is not there

_encode = msgspec.json.Encoder().encode


class Hub:
    """snapshot: the members of a snapshot event (models, devices, draining), from memory."""

    def __init__(
        self, snapshot: Callable[[], dict[str, Any]], *, backlog: int = BACKLOG, progress_s: float = PROGRESS_S
    ) -> None:
        self._snapshot = snapshot
        self._backlog = backlog
        self._progress_s = progress_s
        self._seq = 0
        self._subscribers: set[Subscription] = set()
        self._status: dict[str, str] = {}  # of each model, as last sent
        self._held: dict[str, dict[str, Any]] = {}  # progress that waits for the next flush, the latest of each model
        self._flush: asyncio.TimerHandle | None = None
        self._closed = False

    def publish(self, kind: str, body: dict[str, Any]) -> None:
        """kind: "model", "device" or "draining"; body: the object as its listing has it.

        A change of state goes out at once; mere progress at most every `progress_s` for each model.
        """
        if kind == "model":
            model_id, status = body["id"], body["status"]
            if "progress" in body and self._status.get(model_id) == status:
                self._held[model_id] = body
                if self._flush is None and not self._closed:
                    self._flush = asyncio.get_running_loop().call_later(self._progress_s, self._send_held)
                return
            self._status[model_id] = status
            self._held.pop(model_id, None)
        self._send(kind, body)

    def subscribe(self) -> Subscription:
        subscription = Subscription(self._subscribers, self._backlog)
        subscription.offer(self._frame("snapshot", self._snapshot()))
        if self._closed:
            subscription.end()
        return subscription

    def close(self) -> None:
        """Every stream ends once it has sent what waits."""
        self._closed = True
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        self._send_held()
        for subscription in list(self._subscribers):
            subscription.end()

    def _send_held(self) -> None:
        self._flush = None
        held, self._held = self._held, {}
        for body in held.values():
            self._send("model", body)

    def _send(self, kind: str, body: dict[str, Any]) -> None:
        self._seq += 1
        if not self._subscribers:
            return
        frame = self._frame(kind, body)
        for subscription in list(self._subscribers):
            subscription.offer(frame)

    def _frame(self, kind: str, body: dict[str, Any]) -> bytes:
        return sse.frame(_encode({"seq": self._seq, "type": kind, **body}))


class Subscription:
    """One listener's backlog; a context manager, in the hub's list while it is entered."""

    def __init__(self, registry: set[Subscription], backlog: int) -> None:
        self._registry = registry
        self._backlog = backlog
        self._frames: list[bytes] = []
        self._wake = asyncio.Event()
        self.ended = False
        self.dropped = False  # it did not keep up

    def __enter__(self) -> Subscription:
        self._registry.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._registry.discard(self)

    def offer(self, frame: bytes) -> None:
        if len(self._frames) >= self._backlog:
            self.dropped = True
            self._frames.clear()
            self._registry.discard(self)
            self.end()
        else:
            self._frames.append(frame)
            self._wake.set()

    def end(self) -> None:
        self.ended = True
        self._wake.set()

    async def take(self, comment_s: float = COMMENT_S) -> bytes | None:
        """All that waits, joined; a comment when nothing came for `comment_s`; None at the end."""
        if not self._frames and not self.ended:
            try:
                async with asyncio.timeout(comment_s):
                    await self._wake.wait()
            except TimeoutError:
                return sse.comment()
        self._wake.clear()
        frames, self._frames = self._frames, []
        return b"".join(frames) or None


class EventStream:
    """The response of GET /events, as an ASGI application of its own."""

    def __init__(self, hub: Hub, *, comment_s: float = COMMENT_S, send_s: float = SEND_S) -> None:
        self._hub = hub
        self._comment_s = comment_s
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would keep events until its buffer is full
        ]
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        with self._hub.subscribe() as subscription:
            leaving = asyncio.create_task(_until_gone(receive))
            leaving.add_done_callback(lambda _: subscription.end())
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                while (data := await subscription.take(self._comment_s)) is not None and not leaving.done():
                    async with asyncio.timeout(self._send_s):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                if not subscription.dropped and not leaving.done():
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (TimeoutError, ConnectionError):
                pass  # it takes nothing, or has left: the server cuts a response that was not ended
            finally:
                leaving.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
