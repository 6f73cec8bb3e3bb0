"""The neuron's chat stream as the answer of Responses. A pure state machine: chunks in, events out, in any cut.

    BEFORE   nothing is sent: the relay's heartbeats are all that the client hears
    BETWEEN  response.created and in_progress are out, no item is open
    REASONING, TEXT, REFUSAL, CALL, CUSTOM   an item of this kind is open; TEXT and REFUSAL are parts of a message
    ENDED    response.completed, incomplete or failed is out

The response begins with the first thing that the node says. An item closes when another kind of delta comes; the end
waits for the usage that follows the last delta. An answer in one piece is the same machine with another sink
(responses_sinks.py), so that it cannot say anything else than the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.neuron_stream import ChatStream, Witness
from helexa.core.dialects.node_errors import Naming, same
from helexa.core.dialects.responses_text import TextArgument
from helexa.core.dialects.responses_tools import Called
from helexa.core.errors import UpstreamError


class State(Enum):
    BEFORE = "before"
    BETWEEN = "between"
    REASONING = "reasoning"
    TEXT = "output_text"
    REFUSAL = "refusal"
    CALL = "function_call"
    CUSTOM = "custom_tool_call"
    ENDED = "ended"


_PARTS: Final = frozenset({State.TEXT, State.REFUSAL})
_OPEN: Final = _PARTS | {State.REASONING, State.CALL, State.CUSTOM}
# Why the neuron ended -> why the response is incomplete; all else completes it.
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True, slots=True)
class Ending:
    """incomplete: the reason; None where the response is complete."""

    incomplete: str | None
    usage: chat.Usage | None


class Sink(Protocol):
    """Where the events go. Items are numbered by the sink, from 0 on, without gaps."""

    def start(self) -> None: ...

    def wait(self) -> None:
        """Nothing new, but it is at work."""

    def open_reasoning(self) -> None: ...

    def open_message(self) -> None: ...

    def open_part(self, kind: str) -> None:
        """Of the open message: output_text or refusal."""

    def open_call(self, call_id: str | None, called: Called) -> None: ...

    def delta(self, text: str) -> None:
        """Of what is open: a text, reasoning, arguments."""

    def delta_with_logprobs(self, text: str, tokens: list[chat.Logprob]) -> None:
        """Of an open output_text."""

    def close_part(self) -> object: ...

    def close(self, *, complete: bool) -> None:
        """The open item; its part is closed."""

    def end(self, ending: Ending) -> None: ...

    def take(self) -> bytes:
        """What there is to send by now."""


class Answer(ChatStream):
    """A Mend: body bytes of the neuron's stream in, body bytes for the client out.

    called: what the name of a function means to the client. Raises HelexaError where the stream holds an error, or is
    none; the sink can then still say so.
    """

    __slots__ = ("_argument", "_call", "_called", "_sink", "_state")

    def __init__(
        self, sink: Sink, *, called: Mapping[str, Called], witness: Witness | None = None, naming: Naming = same
    ) -> None:
        super().__init__(witness, naming)
        self._sink = sink
        self._called = called
        self._state = State.BEFORE
        self._call = -1  # the neuron's index of the open call
        self._argument = TextArgument()  # of the open custom tool's call

    def take(self) -> bytes:
        return self._sink.take()

    def on_choice(self, choice: chat.Choice, delta: chat.Delta) -> None:
        if self._state is State.TEXT and choice.logprobs is None and delta.content and not delta.reasoning_content:
            self._sink.delta(delta.content)  # nearly every chunk
            if not delta.tool_calls:
                return
            delta.content = None
        if self._state is State.BEFORE:
            self._start()
        if delta.reasoning_content:
            self._enter(State.REASONING)
            self._sink.delta(delta.reasoning_content)
        if delta.content:
            self._enter(State.TEXT)
            if choice.logprobs is not None and choice.logprobs.content:
                self._sink.delta_with_logprobs(delta.content, choice.logprobs.content)
            else:
                self._sink.delta(delta.content)
        if delta.refusal:
            self._enter(State.REFUSAL)
            self._sink.delta(delta.refusal)
        for call in delta.tool_calls or ():
            self._tool(call)

    def on_comment(self) -> None:
        if self._state is not State.BEFORE:
            self._sink.wait()

    def on_progress(self, progress: chat.PromptProgress) -> None:
        if self._state is State.BEFORE:
            self._start()
        else:
            self._sink.wait()

    def on_end(self) -> None:
        incomplete = _INCOMPLETE.get(self.finish_reason or "")
        if self._state is State.BEFORE:
            self._start()
        self._close(complete=incomplete is None)
        self._sink.end(Ending(incomplete, self.usage))
        self._state = State.ENDED

    def _tool(self, call: chat.ToolCall) -> None:
        function = call.function
        if self._state not in (State.CALL, State.CUSTOM) or call.index != self._call:
            if function is None or not function.name:
                raise UpstreamError(
                    "the node sent a piece of a tool call that is not open; it cannot be shown in order"
                )
            called = self._called.get(function.name) or Called(function.name)
            self._open(State.CUSTOM if called.is_custom else State.CALL)
            self._call = call.index
            self._argument = TextArgument()
            self._sink.open_call(call.id, called)
        if function is None or not function.arguments:
            return
        if self._state is State.CALL:
            self._sink.delta(function.arguments)
        elif text := self._argument.feed(function.arguments):
            self._sink.delta(text)

    def _enter(self, state: State) -> None:
        """Make sure that reasoning, or this part of a message, is open."""
        if self._state is state:
            return
        if state in _PARTS and self._state in _PARTS:
            self._sink.close_part()
            self._state = state
        else:
            self._open(state)
            if state is State.REASONING:
                self._sink.open_reasoning()
                return
            self._sink.open_message()
        self._sink.open_part(state.value)

    def _open(self, state: State) -> None:
        if self.ending or self._state is State.ENDED:
            raise UpstreamError("the node went on after the end of its answer")
        self._close(complete=True)
        self._state = state
        if self.witness is not None:
            self.witness.first_token()

    def _close(self, *, complete: bool) -> None:
        if self._state not in _OPEN:
            return
        if self._state is State.CUSTOM and (rest := self._argument.end()):
            self._sink.delta(rest)
        if self._state in _PARTS:
            self._sink.close_part()
        self._sink.close(complete=complete)
        self._state = State.BETWEEN

    def _start(self) -> None:
        self._state = State.BETWEEN
        self._sink.start()
