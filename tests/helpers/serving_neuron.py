"""A fake neuron that answers requests too: streams, stalls, refuses and dies as it is told. Not a model in sight.

What it does with the next requests stands in `plan`, one entry each; when that is used up, it answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from tests.helpers.fake_neuron import FakeNeuron

from helexa.core import sse

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank")
WORDS = ("Hel", "lo", " wor", "ld")
USAGE = {"prompt_tokens": 7, "completion_tokens": len(WORDS), "total_tokens": 11}


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any


class ServingNeuron(FakeNeuron):
    """go_on: what a `paused` stream waits for; drop: what `silent_until_dropped` does; left: set when a client's
    connection went away under a request."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.plan: deque[Callable[[Request], Awaitable[Response]]] = deque()
        self.seen: list[Seen] = []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        self.arrived = asyncio.Event()
        self.drop = asyncio.Event()
        self.tokens: int | None = None  # what it counts of any prompt; None: it cannot
        self.counted: list[Seen] = []

    def more_routes(self) -> list[Route]:
        counting = Route("/v1/tokens/count", self._count, methods=["POST"])
        return [counting, *(Route(path, self._serve, methods=["POST"]) for path in PATHS)]

    async def _count(self, request: Request) -> Response:
        body = msgspec.json.decode(await request.body())
        self.counted.append(Seen(request.url.path, dict(request.headers), body))
        if self.tokens is None:
            return Response(b"{}", 501, media_type="application/json")
        return Response(msgspec.json.encode({"input_tokens": self.tokens}), media_type="application/json")

    async def _serve(self, request: Request) -> Response:
        self.seen.append(Seen(request.url.path, dict(request.headers), msgspec.json.decode(await request.body())))
        self.arrived.set()
        return await (self.plan.popleft() if self.plan else self.answer)(request)

    # what can be planned

    async def answer(self, request: Request) -> Response:
        """As a node does: usage in a stream only where it was asked for."""
        asked = self.seen[-1]
        if not asked.body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
            return Response(msgspec.json.encode({"choices": [choice], "usage": USAGE}), media_type="application/json")
        usage = asked.headers.get("x-helexa-usage") == "1" or asked.body.get("stream_options", {}).get("include_usage")
        return self._stream(self._words(usage=bool(usage)))

    async def paused(self, request: Request) -> Response:
        """Two words, then nothing until `go_on`."""
        watch = asyncio.create_task(self._until_left(request))
        self._tasks.add(watch)
        watch.add_done_callback(self._tasks.discard)
        return self._stream(self._words(usage=True, pause_after=2))

    async def silent(self, request: Request) -> Response:
        """Nothing at all, until the other end hangs up."""
        await self._until_left(request)
        return Response(b"")

    async def silent_until_dropped(self, request: Request) -> Response:
        """Nothing at all until `drop`; then the connection breaks."""
        await self.drop.wait()
        return await self.dead(request)

    async def dead(self, request: Request) -> Response:
        """The connection breaks before a byte."""
        self._hang_up(request)
        return Response(b"")

    async def dies_after_two_words(self, request: Request) -> Response:
        return self._stream(self._words(usage=True, die_after=2))

    def refuses(self, status: int, **error: Any) -> Callable[[Request], Awaitable[Response]]:
        body = msgspec.json.encode({"error": {"type": "server_error", "param": None, **error}})

        async def refuse(request: Request) -> Response:
            return Response(body, status, headers={"retry-after": "7"}, media_type="application/json")

        return refuse

    # inside

    def _stream(self, frames: AsyncIterator[bytes]) -> Response:
        return StreamingResponse(frames, media_type="text/event-stream")

    async def _words(self, *, usage: bool, pause_after: int = -1, die_after: int = -1) -> AsyncIterator[bytes]:
        yield _chunk({"role": "assistant", "content": None})
        for number, word in enumerate(WORDS):
            if number == pause_after:
                await self.go_on.wait()
            if number == die_after:
                raise ConnectionAbortedError("as planned")  # our server cuts the connection
            yield _chunk({"content": word})
        yield _chunk({}, finish_reason="stop")
        if usage:
            yield sse.frame(msgspec.json.encode({"id": "c1", "choices": [], "usage": USAGE}))
        yield sse.frame(b"[DONE]")

    async def _until_left(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    def _hang_up(self, request: Request) -> None:
        assert self._server is not None
        for connection in list(self._server.connections):
            if connection.peer == request.scope["client"]:
                connection.transport.abort()


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return sse.frame(msgspec.json.encode({"id": "c1", "object": "chat.completion.chunk", "choices": [choice]}))
