"""The two forms of an answer in Anthropic's dialect: a stream of events, and one message. Pure.

Both are driven by the same machine (anthropic_stream.py).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helexa.core.dialects.anthropic_stream import Counts, Ending
from helexa.core.dialects.partial_json import partial_object

_encode = msgspec.json.Encoder().encode

_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_END: Final = b"}}\n\n"


class EventWriter:
    """The stream. HOT: a delta is its JSON string between two constants, the first of them made with its block."""

    __slots__ = ("_head", "_message_id", "_model", "_out")

    def __init__(self, *, message_id: str, model: str) -> None:
        self._message_id = message_id
        self._model = model
        self._out: list[bytes] = []
        self._head = b""  # what precedes a delta's text in the open block

    def take(self) -> bytes:
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def start(self, counts: Counts) -> None:
        message = _message(self._message_id, self._model, [], None, counts)
        self._event("message_start", {"type": "message_start", "message": message})

    def ping(self) -> None:
        self._out.append(_PING)

    def open_text(self, index: int) -> None:
        self._open(index, {"type": "text", "text": ""}, "text_delta", "text")

    def open_thinking(self, index: int) -> None:
        self._open(index, {"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking")

    def open_tool(self, index: int, call_id: str, name: str) -> None:
        block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        self._open(index, block, "input_json_delta", "partial_json")

    def _open(self, index: int, block: dict[str, Any], delta: str, field: str) -> None:
        self._event("content_block_start", {"type": "content_block_start", "index": index, "content_block": block})
        self._head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (index, delta.encode(), field.encode())
        )

    def text(self, text: str) -> None:
        self._out.append(self._head + _encode(text) + _END)

    thinking = arguments = text  # the head knows the difference

    def signature(self, token: str) -> None:
        head = self._head.replace(b'"thinking_delta","thinking":', b'"signature_delta","signature":')
        self._out.append(head + _encode(token) + _END)

    def close(self, index: int) -> None:
        self._event("content_block_stop", {"type": "content_block_stop", "index": index})

    def end(self, ending: Ending) -> None:
        delta = {"stop_reason": ending.stop_reason, "stop_sequence": ending.stop_sequence}
        usage = _usage(ending.counts)
        self._event("message_delta", {"type": "message_delta", "delta": delta, "usage": usage})
        self._out.append(_STOP)

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self._out.append(b"event: " + name.encode() + b"\ndata: " + _encode(data) + b"\n\n")


class MessageBuilder:
    """The answer in one piece; there is nothing to take before its end."""

    __slots__ = ("_blocks", "_message_id", "_model", "_out", "_pieces")

    def __init__(self, *, message_id: str, model: str) -> None:
        self._message_id = message_id
        self._model = model
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open block
        self._out = b""

    def take(self) -> bytes:
        out, self._out = self._out, b""
        return out

    def start(self, counts: Counts) -> None:
        pass  # the end knows better

    def ping(self) -> None:
        pass

    def open_text(self, index: int) -> None:
        self._open({"type": "text", "text": ""})

    def open_thinking(self, index: int) -> None:
        self._open({"type": "thinking", "thinking": "", "signature": ""})

    def open_tool(self, index: int, call_id: str, name: str) -> None:
        self._open({"type": "tool_use", "id": call_id, "name": name, "input": {}})

    def _open(self, block: dict[str, Any]) -> None:
        self._blocks.append(block)
        self._pieces = []

    def text(self, text: str) -> None:
        self._pieces.append(text)

    thinking = arguments = text

    def signature(self, token: str) -> None:
        self._blocks[-1]["signature"] = token

    def close(self, index: int) -> None:
        block, text = self._blocks[-1], "".join(self._pieces)
        if block["type"] != "tool_use":
            block[block["type"]] = text
        elif text:
            block["input"] = partial_object(text)

    def end(self, ending: Ending) -> None:
        self._out = _encode(_message(self._message_id, self._model, self._blocks, ending, ending.counts))


def _message(
    message_id: str, model: str, blocks: list[dict[str, Any]], ending: Ending | None, counts: Counts
) -> dict[str, Any]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": ending.stop_reason if ending is not None else None,
        "stop_sequence": ending.stop_sequence if ending is not None else None,
        "usage": _usage(counts),
    }


def _usage(counts: Counts) -> dict[str, int]:
    """Nobody is billed for writing to our cache: creation is 0, not unknown."""
    return {
        "input_tokens": counts.input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cache_read,
        "output_tokens": counts.output_tokens,
    }
