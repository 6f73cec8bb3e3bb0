"""The neuron's chat stream as Anthropic's answer. A pure state machine: chunks in, events out; any cut of the bytes.

    BEFORE   nothing is sent: the relay's pings are all that the client hears
    BETWEEN  message_start is out, no content block is open
    TEXT, THINKING, TOOL   a block of this kind is open
    ENDED    message_stop is out

message_start goes out with the first progress of the prefill, which knows the whole prompt. A block closes when another
kind of delta comes; message_delta waits for the usage that follows the last delta. An answer in one piece is the same
machine with another sink (anthropic_sinks.py), so that it cannot say anything else than the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.anthropic_errors import naming
from helexa.core.dialects.anthropic_messages import SIGNATURE
from helexa.core.dialects.neuron_stream import ChatStream, Witness
from helexa.core.errors import UpstreamError


class State(Enum):
    BEFORE = "before"
    BETWEEN = "between"
    TEXT = "text"
    THINKING = "thinking"
    TOOL = "tool"
    ENDED = "ended"


_STOP_REASONS: Final = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens as Anthropic counts them: `input_tokens` are those that were not read from the cache."""

    input_tokens: int = 0
    cache_read: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    stop_reason: str
    stop_sequence: str | None
    counts: Counts


class Sink(Protocol):
    """Where the events go. Blocks are numbered by the machine, from 0 on, without gaps."""

    def start(self, counts: Counts) -> None: ...

    def ping(self) -> None: ...

    def open_text(self, index: int) -> None: ...

    def open_thinking(self, index: int) -> None: ...

    def open_tool(self, index: int, call_id: str, name: str) -> None: ...

    def text(self, text: str) -> None:
        """Of the open block, as are the next three."""

    def thinking(self, text: str) -> None: ...

    def signature(self, token: str) -> None: ...

    def arguments(self, json: str) -> None: ...

    def close(self, index: int) -> None: ...

    def end(self, ending: Ending) -> None: ...

    def take(self) -> bytes:
        """What there is to send by now."""


class Answer(ChatStream):
    """A Mend: body bytes of the neuron's stream in, body bytes for the client out.

    max_tokens: as the client asked. Raises HelexaError where the stream holds an error, or is none.
    """

    __slots__ = (
        "_call",
        "_index",
        "_max_tokens",
        "_show_thinking",
        "_signature",
        "_sink",
        "_state",
        "_used_tools",
    )

    def __init__(
        self,
        sink: Sink,
        *,
        message_id: str,
        max_tokens: int | None,
        show_thinking: bool = True,
        witness: Witness | None = None,
    ) -> None:
        super().__init__(witness, naming)
        self._sink = sink
        self._state = State.BEFORE
        self._index = -1
        self._call = -1  # the neuron's index of the open call
        self._used_tools = False
        self._max_tokens = max_tokens
        self._show_thinking = show_thinking
        self._signature = SIGNATURE + message_id

    def take(self) -> bytes:
        return self._sink.take()

    def on_choice(self, choice: chat.Choice, delta: chat.Delta) -> None:
        if delta.content and self._state is State.TEXT and not delta.reasoning_content:
            self._sink.text(delta.content)  # nearly every chunk
        else:
            self._delta(delta)

    def on_comment(self) -> None:
        if self._state is not State.BEFORE:
            self._sink.ping()  # a heartbeat stays one

    def on_progress(self, progress: chat.PromptProgress) -> None:
        if self._state is State.BEFORE:
            self._start(Counts(progress.total - progress.cache, progress.cache))
        else:
            self._sink.ping()

    def _delta(self, delta: chat.Delta) -> None:
        if delta.reasoning_content:
            self._enter(State.THINKING)
            if self._show_thinking:
                self._sink.thinking(delta.reasoning_content)
            else:
                self._sink.ping()  # it is alive, which is all that the client wants to know of it
        text = delta.content or delta.refusal
        if text:
            self._enter(State.TEXT)
            self._sink.text(text)
        for call in delta.tool_calls or ():
            self._tool(call)

    def _tool(self, call: chat.ToolCall) -> None:
        function = call.function
        if self._state is not State.TOOL or call.index != self._call:
            if function is None or not function.name:
                raise UpstreamError(
                    "the node sent a piece of a tool call that is not open; it cannot be shown in order"
                )
            self._close()
            self._open(State.TOOL)
            self._call = call.index
            self._used_tools = True
            self._sink.open_tool(self._index, call.id or f"toolu_{self._index}", function.name)
        if function is not None and function.arguments:
            self._sink.arguments(function.arguments)

    def _enter(self, state: State) -> None:
        """Make sure that a text or thinking block is open."""
        if self._state is state:
            return
        self._close()
        self._open(state)
        if state is State.TEXT:
            self._sink.open_text(self._index)
        else:
            self._sink.open_thinking(self._index)

    def _open(self, state: State) -> None:
        if self.ending or self._state is State.ENDED:
            raise UpstreamError("the node went on after the end of its answer")
        if self._state is State.BEFORE:
            self._start(Counts())  # an engine that told no progress: the true figures come with the end
        self._state = state
        self._index += 1
        if self.witness is not None:
            self.witness.first_token()

    def _close(self) -> None:
        if self._state is State.THINKING:
            self._sink.signature(self._signature)
        if self._state in (State.TEXT, State.THINKING, State.TOOL):
            self._sink.close(self._index)
            self._state = State.BETWEEN

    def _start(self, counts: Counts) -> None:
        self._state = State.BETWEEN
        self._sink.start(counts)

    def on_end(self) -> None:
        if self._state is State.BEFORE:
            self._start(self._counts())
        self._close()
        self._sink.end(Ending(self._stop_reason(), self.stop_sequence, self._counts()))
        self._state = State.ENDED

    def _counts(self) -> Counts:
        usage = self.usage
        if usage is None:
            return Counts()
        cached = usage.cached_tokens
        return Counts(usage.prompt_tokens - cached, cached, usage.completion_tokens)

    def _stop_reason(self) -> str:
        """1. Cut off: by the client's own limit, or by the context. 2. Calls were made, whatever else is said. 3. A
        stop sequence. 4. What the neuron says."""
        if self.finish_reason == "length":
            used = self.usage.completion_tokens if self.usage is not None else 0
            if self._max_tokens is not None and self.usage is not None and used < self._max_tokens:
                return "model_context_window_exceeded"
            return "max_tokens"
        if self._used_tools:
            return "tool_use"
        if self.stop_sequence is not None:
            return "stop_sequence"
        return _STOP_REASONS.get(self.finish_reason or "", "end_turn")
