"""A node that streams a mix of reasoning, text and tool arguments, one delta a write, each with the clock's nanoseconds
as its text, so that the receiver can tell how late it is in whatever dialect it arrives.

    python -m bench.dialects.node PORT GAP_MS
"""

from __future__ import annotations

import asyncio
import json
import sys
from time import monotonic_ns
from typing import Final, cast

import uvloop

REASONING: Final = 30
TEXT: Final = 50
ARGUMENTS: Final = 20
DELTAS: Final = REASONING + TEXT + ARGUMENTS

MODELS = [
    {
        "id": "stub",
        "status": "loaded",
        "harness": "llama",
        "task": "chat",
        "capabilities": ["chat", "tools", "reasoning"],
        "limits": {"context": 32768, "slots": 64},
    }
]
DISCOVERY = {"hostname": "stub", "os": "linux", "kernel": "6", "devices": [], "harnesses": ["llama"]}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
OPENAI_MODELS = {"object": "list", "data": [{"id": "stub", "object": "model"}]}


def event(delta: dict[str, object], finish: str | None = None, **more: object) -> bytes:
    """In llama.cpp's order of members."""
    body = {
        "choices": [{"finish_reason": finish, "index": 0, "delta": delta}],
        "created": 1764000000,
        "id": "chatcmpl-e1yDSngAXMjmciXGppnRhTcSIcDTnnjl",
        "model": "stub",
        "system_fingerprint": "b0-unknown",
        "object": "chat.completion.chunk",
        **more,
    }
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def call(arguments: str, **first: object) -> dict[str, object]:
    function = {"arguments": arguments, **({"name": "look_up"} if first else {})}
    return {"tool_calls": [{"index": 0, "function": function, **first}]}


ROLE = chunk(event({"role": "assistant", "content": None}))
PROGRESS = chunk(
    event(
        {"role": "assistant", "content": None}, prompt_progress={"total": 9, "cache": 0, "processed": 9, "time_ms": 1}
    )
)
CALL = chunk(event(call('{"n":', id="call_1", type="function")))
LAST = chunk(event(call("}"))) + chunk(event({}, "tool_calls"))
USAGE = chunk(
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":100,"total_tokens":109},"timings":{}}\n\n'
)
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
TIME = "@" * 16
MADE = {
    "reasoning": chunk(event({"reasoning_content": TIME})),
    "text": chunk(event({"content": TIME})),
    "arguments": chunk(event(call(TIME))),
}
KINDS = ["reasoning"] * REASONING + ["text"] * TEXT + ["arguments"] * ARGUMENTS


def stamp() -> bytes:
    return b"%016d" % monotonic_ns()


class Connection(asyncio.Protocol):
    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own has another base

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        lower = head.lower()
        at = lower.find(b"\r\ncontent-length:")
        if at >= 0 and len(body) < int(lower[at + 17 :].split(b"\r\n")[0]):
            return
        self._buffer = b""
        if not head.startswith(b"POST"):
            self._whole(head.split(b" ")[1])
            return
        usage = b"x-helexa-usage: 1" in lower or b"include_usage" in body
        self._transport.write(HEAD + (PROGRESS if b'"return_progress":true' in body else b"") + ROLE)
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + self._gap_s
        self._loop.call_at(self._due, self._step, 0, usage)

    def _step(self, number: int, usage: bool) -> None:
        if self._transport.is_closing():
            return
        if number == DELTAS:
            self._transport.write(LAST + (USAGE if usage else b"") + END)
            return
        if number == REASONING + TEXT:
            self._transport.write(CALL)
        self._transport.write(MADE[KINDS[number]].replace(TIME.encode(), stamp()))
        self._due += self._gap_s
        self._loop.call_at(self._due, self._step, number + 1, usage)

    def _whole(self, path: bytes) -> None:
        said: object = {"status": "ok", "uptime_secs": 5, "devices": []}
        if path == b"/events":
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        said = {b"/models": MODELS, b"/discovery": DISCOVERY, b"/v1/models": OPENAI_MODELS}.get(path, said)
        body = json.dumps(said).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


async def main(port: int, gap_ms: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(gap_ms / 1000), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
