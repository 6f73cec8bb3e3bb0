"""Streams asked side by side, again and again, in any dialect; one line of JSON about what came and how late.

python -m bench.dialects.load KEY PORT chat|messages|responses STREAMS ROUNDS
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from functools import partial
from time import monotonic_ns
from typing import Any, Final, cast

import uvloop

STAMP: Final = re.compile(rb'"(\d{16})"')
ASK: Final[dict[str, Any]] = {
    "model": "stub",
    "stream": True,
    "max_tokens": 4096,
    "messages": [{"role": "user", "content": "Look it up."}],
}
SCHEMA: Final = {"type": "object", "properties": {"n": {"type": "integer"}}}
BODIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "chat": (
        "/v1/chat/completions",
        {**ASK, "tools": [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]},
    ),
    "messages": (
        "/v1/messages",
        {**ASK, "tools": [{"name": "look_up", "input_schema": SCHEMA}], "thinking": {"type": "adaptive"}},
    ),
    "responses": (
        "/v1/responses",
        {
            "model": "stub",
            "stream": True,
            "store": False,  # as the agents do that ask so much
            "max_output_tokens": 4096,
            "input": [{"role": "user", "content": "Look it up."}],
            "tools": [{"type": "function", "name": "look_up", "parameters": SCHEMA}],
            "reasoning": {"summary": "auto"},
            "include": ["reasoning.encrypted_content"],
        },
    ),
}


class Asker(asyncio.Protocol):
    """One connection; asks again until its rounds are done."""

    def __init__(self, request: bytes, rounds: int, done: asyncio.Future[None], delays: list[int]) -> None:
        self._request = request
        self._rounds = rounds
        self._done = done
        self._delays = delays
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own has another base
        self._ask()

    def _ask(self) -> None:
        self._tail = b""
        self._seen_head = False
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        if not self._seen_head:
            self._seen_head = True
            self.errors += not data.startswith(b"HTTP/1.1 200")
        self._delays.extend(now - int(found) for found in STAMP.findall(data))
        self._tail = (self._tail + data)[-7:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._rounds -= 1
            if self._rounds:
                self._ask()
            else:
                self._transport.close()
                self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self.errors += 1
            self._done.set_result(None)


def _same(asker: Asker) -> Asker:
    return asker


async def main(key: str, port: int, kind: str, streams: int, rounds: int) -> None:
    path, asked = BODIES[kind]
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nx-api-key: {key}\r\n"
    head += f"Authorization: Bearer {key}\r\nanthropic-version: 2023-06-01\r\nContent-Length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    delays: list[int] = []
    askers: list[Asker] = []
    ends: list[asyncio.Future[None]] = []
    for number in range(streams):
        end = loop.create_future()
        asker = Asker(head.encode() + body, rounds, end, delays)
        await loop.create_connection(partial(_same, asker), "127.0.0.1", port)
        askers.append(asker)
        ends.append(end)
        await asyncio.sleep(0.005 / streams if number else 0)  # spread over one gap
    await asyncio.gather(*ends)
    delays.sort()
    late = {f"p{q}_ms": delays[min(len(delays) - 1, len(delays) * q // 100)] / 1e6 for q in (50, 99)} if delays else {}
    print(json.dumps({"events": len(delays), "errors": sum(a.errors for a in askers), **late}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
