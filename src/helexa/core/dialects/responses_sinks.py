"""The two forms of an answer of Responses: one response object, and a stream of events that builds it. Pure.

Both are driven by the same machine (responses_stream.py), and the stream ends with the very object that the other form
is, so that neither can say anything else.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helexa.core import sse
from helexa.core.dialects import neuron_chat as chat
from helexa.core.dialects.responses_document import Document, error_code
from helexa.core.dialects.responses_input import seal
from helexa.core.dialects.responses_stream import Ending
from helexa.core.dialects.responses_tools import Called
from helexa.core.errors import HelexaError

_encode = msgspec.json.Encoder().encode

# After how long a stream that says nothing new says an event again. Codex gives up a stream after 300 s without one,
# however many comments come; 15 s, as event streams are kept alive elsewhere, leaves room for whoever waits less.
EVENT_EVERY_S: Final = 15.0

_TEXT: Final = b',"logprobs":[],"sequence_number":%d}\n\n'
_OTHER: Final = b',"sequence_number":%d}\n\n'
_HEAD: Final = b'event: %b\ndata: {"type":"%b",%b,"delta":'


class ResponseBuilder:
    """The answer in one piece; there is nothing to take before its end.

    response: the object, once the answer has ended
    """

    __slots__ = ("_document", "_index", "_item", "_logprobs", "_out", "_output", "_part", "_pieces", "response")

    def __init__(self, document: Document) -> None:
        self.response: bytes | None = None
        self._document = document
        self._output: list[bytes] = []  # closed items
        self._index = -1  # of the latest item
        self._item: dict[str, Any] = {}  # the open one, if any
        self._part: dict[str, Any] = {}  # the open part of it, if any
        self._pieces: list[str] = []  # of what is open
        self._logprobs: list[chat.Logprob] = []  # of the open part
        self._out: list[bytes] = []

    def take(self) -> bytes:
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def start(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def open_reasoning(self) -> None:
        self._open("reasoning", "rs", summary=[], **({} if self._document.show_summary else {"content": []}))

    def open_message(self) -> None:
        self._open("message", "msg", role="assistant", content=[])

    def open_part(self, kind: str) -> None:
        text = {"text": "", "annotations": [], "logprobs": []} if kind == "output_text" else {"refusal": ""}
        self._part = {"type": kind, **text}
        self._pieces, self._logprobs = [], []

    def open_call(self, call_id: str | None, called: Called) -> None:
        known = {"call_id": call_id or f"call_{self._document.key}o{self._index + 1}", "name": called.name}
        if called.namespace:
            known["namespace"] = called.namespace
        if called.is_custom:
            self._open("custom_tool_call", "ctc", **known, input="")
            del self._item["status"]  # the one kind of item that has none
        else:
            self._open("function_call", "fc", **known, arguments="")

    def _open(self, kind: str, prefix: str, **members: Any) -> None:
        self._index += 1
        item_id = f"{prefix}_{self._document.key}o{self._index}"
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **members}
        self._pieces = []

    def delta(self, text: str) -> None:
        self._pieces.append(text)

    def delta_with_logprobs(self, text: str, tokens: list[chat.Logprob]) -> None:
        self._pieces.append(text)
        self._logprobs += tokens

    def close_part(self) -> dict[str, Any]:
        part, self._part = self._whole_part(), {}
        self._item["content"].append(part)
        return part

    def close(self, *, complete: bool) -> None:
        self._item = self._whole_item(complete=complete)
        self._output.append(_encode(self._item))
        self._closed()
        self._item = {}

    def _closed(self) -> None:
        """The item is whole, and the last of the output."""

    def end(self, ending: Ending) -> None:
        status = "completed" if ending.incomplete is None else "incomplete"
        self.response = self._document.render(status, self._output, usage=ending.usage, incomplete=ending.incomplete)
        self._ended(status)

    def _ended(self, status: str) -> None:
        assert self.response is not None
        self._out.append(self.response)

    def broken_off(self, status: str = "incomplete", error: dict[str, Any] | None = None) -> bytes:
        """The response as far as it came, for an answer that did not end."""
        output = list(self._output)
        if self._item:
            output.append(_encode(self._whole_item(complete=False)))
        return self._document.render(status, output, error=error)

    # what is open, with what it says

    def _whole_part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        if self._part["type"] == "refusal":
            return {**self._part, "refusal": text}
        return {**self._part, "text": text, "logprobs": [_long(token) for token in self._logprobs]}

    def _whole_item(self, *, complete: bool) -> dict[str, Any]:
        item = dict(self._item)
        kind = item["type"]
        if "status" in item:
            item["status"] = "completed" if complete else "incomplete"
        text = "".join(self._pieces)
        if kind == "message":
            if self._part:
                item["content"] = [*item["content"], self._whole_part()]
        elif kind == "function_call":
            item["arguments"] = text
        elif kind == "custom_tool_call":
            item["input"] = text
        else:
            shown, form = ("summary", "summary_text") if self._document.show_summary else ("content", "reasoning_text")
            item[shown] = [{"type": form, "text": text}]
            if self._document.seal:
                item["encrypted_content"] = seal(text)
        return item


class EventWriter(ResponseBuilder):
    """The stream. HOT: a delta is its JSON string between two constants, the first of them made with its item."""

    __slots__ = ("_head", "_number", "_quiet_at", "_quiet_since", "_sent", "_tail")

    def __init__(self, document: Document) -> None:
        super().__init__(document)
        self._number = 0  # of the next event
        self._sent = 0  # what it was when the client was sent something last
        self._quiet_at = -1  # what it was when it was seen to stand still
        self._quiet_since = 0.0
        self._head = b""  # what precedes a delta's text in what is open
        self._tail = b""  # what follows it

    def anew(self) -> EventWriter:
        """For the next attempt, after one of which the client heard no more than that it is at work."""
        other = EventWriter(self._document)
        other._number = other._sent = self._sent
        return other

    def take(self) -> bytes:
        self._sent = self._number
        return super().take()

    def start(self) -> None:
        if self._number:
            return  # a heartbeat was before it
        response = msgspec.Raw(self._document.render("in_progress", []))
        self._event("response.created", response=response)
        self._event("response.in_progress", response=response)

    def heartbeat(self, text: bytes) -> bytes:
        """The next bytes while no node says anything.   text: for people who watch."""
        self.start()
        self._still_here(text)
        return self.take()

    def wait(self) -> None:
        self._still_here(b"")

    def _still_here(self, text: bytes) -> None:
        """A comment, and now and then an event that says nothing new: there are clients that count events alone."""
        now = self._document.clock()
        if self._number != self._quiet_at:
            self._quiet_at, self._quiet_since = self._number, now
        elif now - self._quiet_since >= EVENT_EVERY_S:
            self._event(
                "response.in_progress", response=msgspec.Raw(self._document.render("in_progress", self._output))
            )
            return
        self._out.append(sse.comment(text))

    def open_reasoning(self) -> None:
        super().open_reasoning()
        self._added()
        if self._document.show_summary:
            part = {"type": "summary_text", "text": ""}
            self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
            self._deltas("response.reasoning_summary_text.delta", summary_index=0)
        else:
            part = {"type": "reasoning_text", "text": ""}
            self._of_item("response.content_part.added", content_index=0, part=part)
            self._deltas("response.reasoning_text.delta", content_index=0)

    def open_message(self) -> None:
        super().open_message()
        self._added()

    def open_part(self, kind: str) -> None:
        super().open_part(kind)
        at = len(self._item["content"])
        self._of_item("response.content_part.added", content_index=at, part=self._part)
        self._deltas(f"response.{kind}.delta", content_index=at)
        if kind == "output_text":
            self._tail = _TEXT

    def open_call(self, call_id: str | None, called: Called) -> None:
        super().open_call(call_id, called)
        self._added()
        what = "custom_tool_call_input" if called.is_custom else "function_call_arguments"
        self._deltas(f"response.{what}.delta")

    def delta(self, text: str) -> None:
        self._pieces.append(text)
        self._out.append(self._head + _encode(text) + self._tail % self._number)
        self._number += 1

    def delta_with_logprobs(self, text: str, tokens: list[chat.Logprob]) -> None:
        super().delta_with_logprobs(text, tokens)
        told = _encode([_short(token) for token in tokens])
        self._out.append(
            self._head + _encode(text) + b',"logprobs":%b,"sequence_number":%d}\n\n' % (told, self._number)
        )
        self._number += 1

    def close_part(self) -> dict[str, Any]:
        at = len(self._item["content"])
        part = super().close_part()
        if part["type"] == "refusal":
            self._of_item("response.refusal.done", content_index=at, refusal=part["refusal"])
        else:
            told = [_short(token) for token in self._logprobs]
            self._of_item("response.output_text.done", content_index=at, text=part["text"], logprobs=told)
        self._of_item("response.content_part.done", content_index=at, part=part)
        return part

    def _closed(self) -> None:
        item = self._item
        kind = item["type"]
        if kind == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            self._of_item("response.function_call_arguments.done", **told)
        elif kind == "custom_tool_call":
            self._of_item("response.custom_tool_call_input.done", input=item["input"])
        elif kind == "reasoning" and item["summary"]:
            part = item["summary"][0]
            self._of_item("response.reasoning_summary_text.done", summary_index=0, text=part["text"])
            self._of_item("response.reasoning_summary_part.done", summary_index=0, part=part)
        elif kind == "reasoning":
            part = item["content"][0]
            self._of_item("response.reasoning_text.done", content_index=0, text=part["text"])
            self._of_item("response.content_part.done", content_index=0, part=part)
        self._event("response.output_item.done", output_index=self._index, item=msgspec.Raw(self._output[-1]))

    def _ended(self, status: str) -> None:
        assert self.response is not None
        self._event(f"response.{status}", response=msgspec.Raw(self.response))

    def fail(self, error: HelexaError) -> bytes:
        """The last events of a stream that cannot go on; both, because some clients know one and some the other."""
        if not self._number:
            self.start()
        if self.response is None:  # what has ended does not fail any more
            told = {"code": error_code(error), "message": error.message}
            self.response = self.broken_off("failed", told)
            self._event("response.failed", response=msgspec.Raw(self.response))
        self._event("error", code=error.code, message=error.message, param=error.param)
        return self.take()

    def _added(self) -> None:
        self._event("response.output_item.added", output_index=self._index, item=self._item)

    def _of_item(self, kind: str, /, **members: Any) -> None:
        self._event(kind, item_id=self._item["id"], output_index=self._index, **members)

    def _event(self, kind: str, /, **members: Any) -> None:
        data = _encode({"type": kind, **members, "sequence_number": self._number})
        self._number += 1
        self._out.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")

    def _deltas(self, name: str, **members: int) -> None:
        """The deltas of what was opened are such events."""
        at = _encode({"item_id": self._item["id"], "output_index": self._index, **members})[1:-1]
        self._head = _HEAD % (name.encode(), name.encode(), at)
        self._tail = _OTHER


def _long(token: chat.Logprob) -> dict[str, Any]:
    """In a text that is whole."""
    tops = [{"token": top.token, "bytes": top.bytes or [], "logprob": top.logprob} for top in token.top_logprobs]
    return {"token": token.token, "bytes": token.bytes or [], "logprob": token.logprob, "top_logprobs": tops}


def _short(token: chat.Logprob) -> dict[str, Any]:
    """In an event."""
    tops = [{"token": top.token, "logprob": top.logprob} for top in token.top_logprobs]
    return {"token": token.token, "logprob": token.logprob, "top_logprobs": tops}
