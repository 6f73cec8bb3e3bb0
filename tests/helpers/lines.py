"""One client, one relay and one upstream without sockets, and the bytes of a stream of chat completions."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from tests.helpers.wires import CHAT, Recorder, Turn, client_of, dechunk, request, waiting_upstream

from helexa.core.relay.server import Server

ASK = b'{"model":"qwen","stream":true}'
ASK_USAGE = b'{"model":"qwen","stream":true,"stream_options":{"include_usage":true}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: x\r\n\r\n"


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event(id="c1", choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


ROLE = event(id="c1", choices=[{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}])
STOP = event(id="c1", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = event(id="c1", choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
FIRST = delta("first")

TEXTS = st.lists(
    st.text(alphabet='ab"\\\n\x00é:{}0', max_size=12) | st.just('"usage":{"x":1}'), min_size=1, max_size=12
)


class Line:
    """One client, one relay, one upstream, no sockets."""

    def __init__(self, body: bytes = ASK, version: bytes = b"HTTP/1.1", turn: Turn | None = None, **route: Any) -> None:
        upstream, self.connection, self.up = waiting_upstream()
        self.director = Recorder(upstream, **route)
        self.server = Server(director=self.director, endpoints=[CHAT])
        self.client, self.wire = client_of(self.server, turn)
        self.client.data_received(request(body).replace(b"HTTP/1.1", version, 1))

    def hear(self, *pieces: bytes) -> None:
        for piece in pieces:
            if piece:
                self.connection.data_received(piece)

    @property
    def body(self) -> bytes:
        return dechunk(self.wire.sent)


def chunked(data: bytes, sizes: list[int]) -> bytes:
    out, at, i = b"", 0, 0
    while at < len(data):
        piece = data[at : at + sizes[i % len(sizes)]]
        out += b"%x\r\n%b\r\n" % (len(piece), piece)
        at, i = at + len(piece), i + 1
    return out + b"0\r\n\r\n"
