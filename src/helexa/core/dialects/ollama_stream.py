"""The neuron's stream as Ollama's answer. A pure state machine: chunks in, lines of JSON out; any cut of the bytes.

Text and reasoning go out as they come. A call goes out whole, when the next piece is not its own: its arguments are an
object there. The last line has why it ended, and the figures. An answer in one piece is the same machine with another
sink, so that it cannot say anything else than the lines together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import msgspec

from helexa.core.bodies import NOT_JSON
from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.neuron_stream import ChatStream, Witness
from helexa.core.dialects.ollama_request import naming
from helexa.core.errors import UpstreamError

_encode = msgspec.json.Encoder().encode
_DONE_REASONS: Final = {"length": "length"}  # everything else is "stop", calls too
_LINES: Final = b',"done":false}\n'


@dataclass(frozen=True, slots=True)
class Clocks:
    """started, sent: when the request came, and when a node was asked (both of `now`, seconds). What lies between them
    is the wait for a load. wall: seconds since 1970."""

    started: float
    sent: float
    now: Callable[[], float]
    wall: Callable[[], float]

    def timestamp(self) -> str:
        return datetime.fromtimestamp(self.wall(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Sink(Protocol):
    """Where what was generated goes; logprobs: of the tokens of this piece, encoded, or b""."""

    def text(self, text: str, logprobs: bytes) -> None: ...

    def thinking(self, text: str, logprobs: bytes) -> None: ...

    def call(self, call: dict[str, Any]) -> None: ...

    def end(self, done_reason: str, figures: dict[str, int]) -> None: ...

    def take(self) -> bytes:
        """What there is to send by now."""


class Answer(ChatStream):
    """A Mend: body bytes of the neuron's stream in, body bytes for the client out. Raises HelexaError where the stream
    holds an error, or is none."""

    __slots__ = ("_arguments", "_call", "_calls", "_clocks", "_first_at", "_sink")

    def __init__(self, sink: Sink, clocks: Clocks, *, witness: Witness | None = None) -> None:
        super().__init__(witness, naming)
        self._sink = sink
        self._clocks = clocks
        self._first_at = 0.0
        self._call: chat.ToolCall | None = None  # the open one
        self._arguments: list[str] = []
        self._calls = 0

    def take(self) -> bytes:
        return self._sink.take()

    def on_choice(self, choice: chat.Choice, delta: chat.Delta) -> None:
        logprobs = _logprobs(choice.logprobs) if choice.logprobs is not None else b""
        text = delta.content or delta.refusal
        if not (text or delta.reasoning_content or delta.tool_calls):
            if logprobs:
                self._sink.text("", logprobs)
            return
        self._began()
        if delta.reasoning_content:
            self._close_call()
            self._sink.thinking(delta.reasoning_content, logprobs)
            logprobs = b""
        if text:
            self._close_call()
            self._sink.text(text, logprobs)
        for call in delta.tool_calls or ():
            self._piece(call)

    def on_text(self, text: str) -> None:
        self._began()
        self._sink.text(text, b"")

    def on_end(self) -> None:
        self._close_call()
        self._sink.end(_DONE_REASONS.get(self.finish_reason or "", "stop"), self._figures())

    def _began(self) -> None:
        if not self._first_at:
            self._first_at = self._clocks.now()
            if self.witness is not None:
                self.witness.first_token()

    def _piece(self, piece: chat.ToolCall) -> None:
        function = piece.function
        if self._call is None or piece.index != self._call.index:
            self._close_call()
            if function is None or not function.name:
                raise UpstreamError(
                    "the node sent a piece of a tool call that is not open; it cannot be shown in order"
                )
            self._call = piece
        if function is not None and function.arguments:
            self._arguments.append(function.arguments)

    def _close_call(self) -> None:
        """The open call is whole. One that the token limit cut off is told as the text it is, never as half a call."""
        call, self._call = self._call, None
        if call is None:
            return
        assert call.function is not None
        text = "".join(self._arguments)
        self._arguments.clear()
        if not text and self.finish_reason != "length":
            text = "{}"  # a function without parameters
        name = call.function.name or ""
        try:
            whole = isinstance(msgspec.json.decode(text), dict)
        except NOT_JSON:
            whole = False
        if not whole:
            self._sink.text(f'{{"name": {_encode(name).decode()}, "arguments": {text}', b"")
            return
        function = {"index": self._calls, "name": name, "arguments": msgspec.Raw(text.encode())}
        self._calls += 1
        self._sink.call({"id": call.id, "function": function} if call.id else {"function": function})

    def _figures(self) -> dict[str, int]:
        """Nanoseconds. The engine's own times where it tells them, else ours, which have the way there in them."""
        clocks, timings, usage = self._clocks, self.timings or {}, self.usage
        ended = clocks.now()
        first = self._first_at or ended
        figures = {
            "total_duration": _ns(ended - clocks.started),
            "load_duration": _ns(clocks.sent - clocks.started),
        }
        if usage is not None:
            figures["prompt_eval_count"] = usage.prompt_tokens
        figures["prompt_eval_duration"] = _told(timings, "prompt_ms", first - clocks.sent)
        if usage is not None:
            figures["eval_count"] = usage.completion_tokens
        figures["eval_duration"] = _told(timings, "predicted_ms", ended - first)
        return figures


class Lines:
    """The stream: one object a line. HOT: a piece is its JSON string between constants.

    field: b"message" (chat) or b"response" (generate), which have their text in different places.
    """

    __slots__ = ("_clocks", "_is_chat", "_model", "_out", "_text", "_thinking", "_thought")

    def __init__(self, *, model: str, is_chat: bool, clocks: Clocks) -> None:
        self._clocks = clocks
        self._is_chat = is_chat
        self._model = b'{"model":' + _encode(model) + b',"created_at":"'
        self._out: list[bytes] = []
        if is_chat:
            self._text = b'","message":{"role":"assistant","content":', b"}"
            self._thinking = b'","message":{"role":"assistant","content":"","thinking":', b"}"
        else:
            self._text = b'","response":', b""
            self._thinking = b'","response":"","thinking":', b""

    def take(self) -> bytes:
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def text(self, text: str, logprobs: bytes) -> None:
        self._piece(self._text, text, logprobs)

    def thinking(self, text: str, logprobs: bytes) -> None:
        self._piece(self._thinking, text, logprobs)

    def _piece(self, around: tuple[bytes, bytes], text: str, logprobs: bytes) -> None:
        beside = b',"logprobs":' + logprobs if logprobs else b""
        now = self._clocks.timestamp().encode()
        self._out.append(self._model + now + around[0] + _encode(text) + around[1] + beside + _LINES)

    def call(self, call: dict[str, Any]) -> None:
        now = self._clocks.timestamp().encode()
        message = _encode({"role": "assistant", "content": "", "tool_calls": [call]})
        self._out.append(self._model + now + b'","message":' + message + _LINES)

    def end(self, done_reason: str, figures: dict[str, int]) -> None:
        now = self._clocks.timestamp().encode()
        last = _encode({"done": True, "done_reason": done_reason, **figures})
        self._out.append(self._model + now + self._text[0] + b'""' + self._text[1] + b"," + last[1:] + b"\n")


class Whole:
    """The answer in one piece; there is nothing to take before its end."""

    __slots__ = ("_calls", "_clocks", "_is_chat", "_logprobs", "_model", "_out", "_text", "_thinking")

    def __init__(self, *, model: str, is_chat: bool, clocks: Clocks) -> None:
        self._clocks = clocks
        self._is_chat = is_chat
        self._model = model
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[bytes] = []
        self._out = b""

    def take(self) -> bytes:
        out, self._out = self._out, b""
        return out

    def text(self, text: str, logprobs: bytes) -> None:
        self._text.append(text)
        self._keep(logprobs)

    def thinking(self, text: str, logprobs: bytes) -> None:
        self._thinking.append(text)
        self._keep(logprobs)

    def _keep(self, logprobs: bytes) -> None:
        if logprobs:
            self._logprobs.append(logprobs[1:-1])

    def call(self, call: dict[str, Any]) -> None:
        self._calls.append(call)

    def end(self, done_reason: str, figures: dict[str, int]) -> None:
        text = "".join(self._text)
        said: dict[str, Any] = {"role": "assistant", "content": text} if self._is_chat else {"response": text}
        if self._thinking:
            said["thinking"] = "".join(self._thinking)
        if self._calls:
            said["tool_calls"] = self._calls
        answer: dict[str, Any] = {"model": self._model, "created_at": self._clocks.timestamp()}
        answer |= {"message": said} if self._is_chat else said
        if self._logprobs:
            answer["logprobs"] = msgspec.Raw(b"[" + b",".join(self._logprobs) + b"]")
        self._out = _encode({**answer, "done": True, "done_reason": done_reason, **figures})


def loaded(model: str, done_reason: str, *, is_chat: bool, clocks: Clocks, stream: bool) -> bytes:
    """The whole answer to a request that only wanted the model loaded."""
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    answer = {"model": model, "created_at": clocks.timestamp(), **said, "done": True, "done_reason": done_reason}
    return _encode(answer) + (b"\n" if stream else b"")


def _logprobs(told: chat.Logprobs) -> bytes:
    return _encode(told.content) if told.content else b""


def _told(timings: dict[str, Any], name: str, else_s: float) -> int:
    told = timings.get(name)
    return round(told * 1e6) if isinstance(told, int | float) else _ns(else_s)


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
