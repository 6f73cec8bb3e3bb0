"""A streaming client that adds next to nothing: while an answer comes it notes when each read came, no more.

What was said is taken apart afterwards. One connection, made before the clock starts, for each request.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

LAST_CHUNK: Final = b"0\r\n\r\n"
DELTA: Final = re.compile(rb'"(?:content|text|reasoning_content)":"[^"]')  # text was generated: no role, no end
TIMINGS: Final = re.compile(rb'"timings":(\{[^}]*\})')


@dataclass(frozen=True, slots=True)
class Side:
    """Where the client connects, and as whom. unix: a socket's path in place of the port."""

    name: str
    port: int = 0
    unix: str | None = None
    key: str | None = None
    path: str = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request's first byte.

    prompt_tokens: computed, not found in the cache. None where the engine's own figures did not get through: they
    come with the usage, which a gateway asks for itself and cuts out for a client that did not.
    """

    first_s: float
    last_s: float
    tokens: int
    prompt_tokens: int | None

    @property
    def decode_tok_s(self) -> float:
        return (self.tokens - 1) / (self.last_s - self.first_s)


class Stream(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens  # asked for
        self._reads: list[bytes] = []
        self._times: list[float] = []
        self._sent = 0.0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._times.append(time.perf_counter())
        self._reads.append(data)
        if (data.endswith(b"\r\n" + LAST_CHUNK) or data == LAST_CHUNK) and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)  # _read tells what came

    def ask(self, request: bytes) -> None:
        self._sent = time.perf_counter()
        self._transport.write(request)

    async def answer(self) -> Answer:
        try:
            async with asyncio.timeout(300):
                await self._done
        finally:
            self._transport.abort()
        return self._read()

    def _read(self) -> Answer:
        whole = b"".join(self._reads)
        ends = list(accumulate(map(len, self._reads)))
        deltas = [found.end() for found in DELTA.finditer(whole)]
        if not whole.startswith(b"HTTP/1.1 200") or not deltas or b'"finish_reason":"length"' not in whole:
            raise SystemExit(f"this is no answer of {self._tokens} tokens: {whole[:500]!r} ... {whole[-1500:]!r}")
        timings = TIMINGS.search(whole)
        told: dict[str, Any] = json.loads(timings[1]) if timings is not None else {}
        return Answer(
            first_s=self._times[bisect_left(ends, deltas[0])] - self._sent,
            last_s=self._times[bisect_left(ends, deltas[-1])] - self._sent,
            tokens=told.get("predicted_n", self._tokens),
            prompt_tokens=told.get("prompt_n"),
        )


async def ask_at_once(side: Side, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """All of them at the same time, each on a connection of its own that is open already."""
    streams = [await _connect(side, body["max_tokens"]) for body in bodies]
    requests = [_request(side, body) for body in bodies]
    for stream, request in zip(streams, requests, strict=True):
        stream.ask(request)
    return [await stream.answer() for stream in streams]


async def _connect(side: Side, tokens: int) -> Stream:
    loop = asyncio.get_running_loop()
    if side.unix is not None:
        _, stream = await loop.create_unix_connection(lambda: Stream(tokens), side.unix)
    else:
        _, stream = await loop.create_connection(lambda: Stream(tokens), "127.0.0.1", side.port)
    return stream


def _request(side: Side, body: dict[str, Any]) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    key = f"authorization: Bearer {side.key}\r\n" if side.key is not None else ""
    head = (
        f"POST {side.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{key}"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
