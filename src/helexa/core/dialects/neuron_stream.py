"""Reading the neuron's chat stream, for every dialect that it is turned into. Pure: bytes in any cut in, hooks called.

A machine of a dialect inherits this, says what becomes of each delta, and what is to be sent. It is the same for a
stream and for an answer in one piece, so that the two cannot say different things.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, Protocol

from helexa.core import sse
from helexa.core.bodies import NOT_JSON
from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.node_errors import Naming, from_object, same
from helexa.core.errors import UpstreamError

_DATA: Final = b"data: "
_PIECE: Final = 32 << 10  # the reader moves what is left behind each event: a whole answer at once would be quadratic


class Witness(Protocol):
    """Who has to know what the neuron said, apart from the client."""

    def first_token(self) -> None:
        """Something was generated; called once at least, and for later blocks again."""

    def ended(self, usage: chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None: ...


class ChatStream(ABC):
    """A Mend, but for its hooks. Raises HelexaError where the stream holds an error, or is none.

    ending: the last delta was there; usage may follow.   ended: the end is told, nothing follows.
    """

    __slots__ = ("ended", "ending", "finish_reason", "naming", "reader", "stop_sequence", "timings", "usage", "witness")

    def __init__(self, witness: Witness | None = None, naming: Naming = same) -> None:
        self.witness = witness
        self.naming = naming
        self.reader = sse.EventReader()
        self.ending = self.ended = False
        self.stop_sequence: str | None = None
        self.finish_reason: str | None = None
        self.usage: chat.Usage | None = None
        self.timings: dict[str, Any] | None = None

    # what a dialect says

    @abstractmethod
    def on_choice(self, choice: chat.Choice, delta: chat.Delta) -> None:
        """HOT, once per chunk: what was generated."""

    def on_text(self, text: str) -> None:
        """The same of a completion; overridden where one may be asked for."""
        raise UpstreamError("the node answered a chat with a completion")

    def on_progress(self, progress: chat.PromptProgress) -> None:  # noqa: B027 - nothing to say of it is an answer
        """The prefill went on."""

    def on_comment(self) -> None:  # noqa: B027
        """The node's heartbeat."""

    @abstractmethod
    def on_end(self) -> None:
        """Everything is known; called once."""

    @abstractmethod
    def take(self) -> bytes:
        """What there is to send by now."""

    # the stream

    def feed(self, data: bytes) -> bytes:
        """HOT, once per read: one decode and one template per event. Bench: bench/dialects."""
        if not self.reader.pending and data.endswith(b"\n\n") and b"\r" not in data and len(data) < _PIECE:
            for block in data[:-2].split(b"\n\n"):  # whole events, as engines write them
                self._block(block)
        else:
            for at in range(0, len(data), _PIECE):
                for block in self.reader.blocks(data[at : at + _PIECE]):
                    self._block(block)
        return self.take()

    def finish(self) -> bytes:
        if self.reader.pending.strip():
            self._block(self.reader.pending)
        if not self.ended:
            if not self.ending:
                raise UpstreamError("the node ended its stream before the answer was whole")
            self._end()
        return self.take()

    def _block(self, block: bytes) -> None:
        if block.startswith(_DATA) and b"\n" not in block:
            data = block[6:]
        else:
            event = sse.parse(block)
            if event.comment or not event.data:
                self.on_comment()
                return
            data = event.data
        if data == chat.DONE:
            if self.ending and not self.ended:
                self._end()
            return
        try:
            chunk = chat.decode(data)
        except NOT_JSON as err:
            raise UpstreamError(f"the node sent an event that is no chunk of a chat: {err}") from None
        choices = chunk.choices
        if choices:
            choice = choices[0]
            delta = choice.delta
            if delta is not None:
                self.on_choice(choice, delta)
            elif choice.text:
                self.on_text(choice.text)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
                self.stop_sequence = choice.stop_reason
                self.ending = True
        if chunk.usage is None and chunk.prompt_progress is None and chunk.error is None and chunk.timings is None:
            return
        self._beside(chunk)

    def _beside(self, chunk: chat.Chunk) -> None:
        """What a chunk tells beside its deltas."""
        if chunk.error is not None:
            raise from_object(chunk.error, self.naming)
        if chunk.prompt_progress is not None:
            self.on_progress(chunk.prompt_progress)
        if chunk.timings is not None:
            self.timings = chunk.timings
        if chunk.usage is not None:
            self.usage = chunk.usage
            if self.ending and not self.ended:
                self._end()

    def _end(self) -> None:
        self.on_end()
        self.ended = True
        if self.witness is not None:
            self.witness.ended(self.usage, self.finish_reason, self.timings)
