"""What stands behind a marker that begins a call: each form as a small machine. Pure.

A block is fed until `rest` is there: the text behind it. What it finds to be no call comes back as text, but for its
first bit, in `rest`, where a marker may stand that begins another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from helexa.neuron.harness.answers import calls
from helexa.neuron.harness.answers.pieces import Tools
from helexa.neuron.harness.answers.scanning import JsonEnd, NotJson

_HEAD: Final = 256  # characters before a call's arguments: a name has 128 at most
_STREAMED: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_FIRST_KEY: Final = re.compile(r'\s*\{\s*"([^"\\]*)"(?:\s*:\s*"([^"\\]*)")?')
_CALL_KEYS: Final = frozenset({"name", "function", "type", "id", "arguments", "parameters"})


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Started:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    text: str


Event = Text | Started | Arguments


class Block(Protocol):
    rest: str | None

    def feed(self, text: str) -> list[Event]: ...

    def end(self) -> list[Event]: ...


class _Steps:
    """Reads its buffer step by step; a step returns the next one, or None to wait for more text."""

    def __init__(self, opening: str, tools: Tools, *, stream: bool) -> None:
        self.rest: str | None = None
        self._tools = tools
        self._stream = stream
        self._raw = opening  # all since the last call
        self._opening = len(opening)
        self._text = ""  # not yet read
        self._scanned = 0  # of _text
        self._end = JsonEnd()
        self._events: list[Event] = []
        self._step: Callable[[], Any] | None = None
        self._begun = False  # a call whose arguments are streamed

    def feed(self, text: str) -> list[Event]:
        self._raw += text
        self._text += text
        while self.rest is None and self._step is not None:
            step = self._step()
            if step is None:
                break
            self._step = step
        events, self._events = self._events, []
        return events

    def end(self) -> list[Event]:
        """Cut off, or ended without what should close it."""
        return [Text(self._raw)] if self._raw.strip() and not self._begun else []

    def _broken(self) -> None:
        keep = self._opening or 1
        self._events.append(Text(self._raw[:keep]))
        self.rest = self._raw[keep:]

    def _done(self) -> None:
        self.rest = self._text

    def _call(self, call: calls.NamedCall | None, then: Callable[[], Any]) -> Any:
        if call is None:
            return self._broken()
        self._events += [Started(call[0]), Arguments(call[1])]
        return self._passed(then)

    def _passed(self, then: Callable[[], Any]) -> Callable[[], Any]:
        self._raw = self._text
        self._opening = 0
        self._begun = False
        return then

    def _take(self, size: int) -> str:
        taken, self._text = self._text[:size], self._text[size:]
        self._scanned = 0
        return taken

    def _scan(self) -> int:
        """Where the JSON value at the beginning of the text ends; -1: not yet, -2: it is none."""
        try:
            end = self._end.feed(self._text, self._scanned)
        except NotJson:
            return -2
        self._scanned = len(self._text)
        return end

    def _stream_arguments(self, then: Callable[[], Any]) -> Any:
        """The object at the beginning of the text, told as it comes."""
        end = self._scan()
        if end == -2:
            end = 0  # cannot be where a grammar holds it; what follows is text
        taken = self._take(end if end >= 0 else len(self._text))
        if taken:
            self._events.append(Arguments(taken))
        return self._passed(then) if end >= 0 else None


class JsonCalls(_Steps):
    """`{"name": ..., "arguments": {...}}`, or an array of such, then `closing` where it is there.

    bare: nothing announced it, so that it is given up as soon as its first key says that it is something else.
    """

    def __init__(self, opening: str, tools: Tools, *, stream: bool, closing: str = "", bare: bool = False) -> None:
        super().__init__(opening, tools, stream=stream)
        self._closing = closing
        self._bare = bare
        self._array = False
        self._step = self._before

    def _before(self) -> Any:
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return None
        if self._text[0] == "[" and not self._array and not self._bare:
            self._array = True
            self._take(1)
            return self._before
        if self._text[0] != "{":
            return self._broken()
        self._end = JsonEnd()
        return self._object

    def _object(self) -> Any:
        if self._stream and (head := _STREAMED.match(self._text)) is not None and head.group(1) in self._tools:
            self._events.append(Started(head.group(1)))
            self._begun = True
            self._take(head.end())
            self._end = JsonEnd()
            return lambda: self._stream_arguments(self._behind_arguments)
        if self._bare and not self._may_be_call():
            return self._broken()
        end = self._scan()
        if end == -1:
            return None
        if end == -2:
            return self._broken()
        call = calls.json_call(self._text[:end], self._tools, bare=self._bare)
        if call is not None:
            self._take(end)
        return self._call(call, self._between)

    def _may_be_call(self) -> bool:
        first = _FIRST_KEY.match(self._text)
        if first is None:
            return True
        key, value = first.groups()
        return key in _CALL_KEYS and (key != "name" or value is None or value in self._tools)

    def _behind_arguments(self) -> Any:
        """The rest of the call's object, which says nothing more."""
        self._end = JsonEnd(depth=1)
        return self._skip_object

    def _skip_object(self) -> Any:
        end = self._scan()
        if end == -1:
            return None
        self._take(max(end, 0))
        return self._passed(self._between)

    def _between(self) -> Any:
        if not self._array:
            return self._close
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return None
        if self._text[0] == ",":
            self._take(1)
            return self._before
        if self._text[0] == "]":
            self._take(1)
            return self._passed(self._close)
        return self._broken()

    def _close(self) -> Any:
        return _closed(self, (self._closing,) if self._closing else ())

    def end(self) -> list[Event]:
        return [] if self._step in (self._close, self._between, self._skip_object) else super().end()


class HeadedCall(_Steps):
    """A name in a form of its own, then the arguments as JSON, then the `closings` that are there, in this order.

    head: (what has come) -> the name and where its form ends, None while that is open.
    fence: may stand before the arguments.
    """

    def __init__(
        self,
        opening: str,
        tools: Tools,
        *,
        stream: bool,
        head: Callable[[str], tuple[str, int] | None],
        fence: str = "",
        closings: Sequence[str] = (),
    ) -> None:
        super().__init__(opening, tools, stream=stream)
        self._head = head
        self._fence = fence
        self._closings = tuple(closings)
        self._name = ""
        self._step = self._named

    def _named(self) -> Any:
        found = self._head(self._text)
        if found is None and len(self._text) <= _HEAD:
            return None
        if found is None or found[1] > _HEAD or found[0] not in self._tools:
            return self._broken()
        self._name = found[0]
        self._take(found[1])
        return self._before

    def _before(self) -> Any:
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text or (self._text != self._fence and self._fence.startswith(self._text)):
            return None
        if self._fence and self._text.startswith(self._fence):
            self._take(len(self._fence))
            self._fence = ""
            return self._before
        if self._text[0] != "{":
            return self._broken()
        self._end = JsonEnd()
        if self._stream:
            self._events.append(Started(self._name))
            self._begun = True
            return lambda: self._stream_arguments(self._close)
        return self._object

    def _object(self) -> Any:
        end = self._scan()
        if end == -1:
            return None
        arguments = calls.object_text(self._text[:end]) if end >= 0 else None
        if arguments is None:
            return self._broken()
        self._take(end)
        return self._call((self._name, arguments), self._close)

    def _close(self) -> Any:
        return _closed(self, self._closings)

    def end(self) -> list[Event]:
        return [] if self._step == self._close else super().end()


def _closed(block: Any, closings: tuple[str, ...]) -> Any:
    """Read over the closings that are there."""
    text = block._text
    for i, closing in enumerate(closings):
        stripped = text.lstrip()
        if stripped.startswith(closing):
            text = stripped[len(closing) :]
        elif any(later.startswith(stripped) for later in closings[i:]):
            return None
    block._text = text
    return block._done()


class XmlCall(_Steps):
    """`<function=name>`, `<parameter=key>` with a bare value in each, `</function>`, then `closing` where it is there.

    Values are typed by the schema. Not streamed: they become JSON when they are whole.
    """

    _PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
    _END: Final = "</function>"

    def __init__(self, opening: str, tools: Tools, *, function: str = "<function=", closing: str = "") -> None:
        super().__init__(opening, tools, stream=False)
        self._function = function  # what the name stands behind; "" where `opening` was that
        self._closing = closing
        self._name = ""
        self._step = self._named

    def _named(self) -> Any:
        text = self._text.lstrip()
        if not text.startswith(self._function):
            return None if self._function.startswith(text) else self._broken()
        name, found, _ = text[len(self._function) :].partition(">")
        if not found and len(text) <= _HEAD:
            return None
        if name not in self._tools:
            return self._broken()
        self._name = name
        self._take(self._text.index(">") + 1)
        return self._parameters

    def _parameters(self) -> Any:
        end = self._text.find(self._END, max(0, self._scanned - len(self._END)))
        self._scanned = len(self._text)
        while end >= 0:
            body = self._text[:end].rstrip()
            if not body or body.endswith("</parameter>"):
                break
            end = self._text.find(self._END, end + 1)  # within a value
        if end < 0:
            return None
        arguments = self._arguments(self._text[:end])
        if arguments is None:
            return self._broken()
        self._take(end + len(self._END))
        return self._call((self._name, calls.dumps(arguments)), self._close)

    def _arguments(self, body: str) -> dict[str, Any] | None:
        properties = (self._tools[self._name] or {}).get("properties")
        schemas = properties if isinstance(properties, dict) else {}
        found: dict[str, Any] = {}
        at = 0
        while (match := self._PARAMETER.match(body, at)) is not None and match.end() > at:
            key = match.group(1).strip()
            found[key] = calls.typed(match.group(2), schemas.get(key))
            at = match.end()
        return found if not body[at:].strip() else None

    def _close(self) -> Any:
        return _closed(self, (self._closing,) if self._closing else ())

    def end(self) -> list[Event]:
        return [] if self._step == self._close else super().end()


class Fenced(_Steps):
    """Calls in a fence of three backticks: as JSON, or as Python. opening: with the fence's language."""

    _END: Final = re.compile(r"\n[ \t]{0,3}```")

    def __init__(self, opening: str, tools: Tools, *, bare: bool = False) -> None:
        super().__init__(opening, tools, stream=False)
        self._bare = bare
        self._step = self._body

    def _body(self) -> Any:
        if self._bare and not self._may_be_call():
            return self._broken()
        match = self._END.search(self._text, max(0, self._scanned - 8))
        self._scanned = len(self._text)
        if match is None:
            return None
        found = written_calls(self._text[: match.start()], self._tools)
        if found is None:
            return self._broken()
        self._take(match.end())
        for call in found:
            self._events += [Started(call[0]), Arguments(call[1])]
        self._raw = ""
        return self._done()

    def _may_be_call(self) -> bool:
        text = self._text.lstrip()
        if text[:1] == "[":
            text = text[1:].lstrip()
        first = _FIRST_KEY.match(text)
        if first is None:
            return not text or text[0] == "{"
        key, value = first.groups()
        return key in _CALL_KEYS and (key != "name" or value is None or value in self._tools)

    def end(self) -> list[Event]:
        """The fence may be left open where the answer ends."""
        found = written_calls(self._text, self._tools)
        if found is None:
            return super().end()
        return [event for call in found for event in (Started(call[0]), Arguments(call[1]))]


class ToTheEnd(_Steps):
    """JSON calls with `;` between them; or, to the end of the answer, calls as Python, or program text for a tool that
    runs it."""

    def __init__(self, opening: str, tools: Tools, *, stream: bool) -> None:
        super().__init__(opening, tools, stream=stream)
        self._json: JsonCalls | None = None
        self._step = self._first

    def _first(self) -> Any:
        if self._text.lstrip()[:1] != "{":
            return None  # all of it is read in the end
        self._json = JsonCalls(self._raw[: self._opening], self._tools, stream=self._stream)
        return self._in_json

    def _in_json(self) -> Any:
        assert self._json is not None
        events = self._json.feed(self._take(len(self._text)))
        self._events += events
        if self._json.rest is None:
            return None
        self._text = self._json.rest
        if any(isinstance(event, Text) for event in events):
            return self._done()
        self._json = None
        return self._next

    def _next(self) -> Any:
        rest = self._text.lstrip("; \t\r\n")
        if not rest:
            return None
        if rest[0] != "{":
            return self._done()
        between = self._take(len(self._text) - len(rest))
        self._json = JsonCalls(between, self._tools, stream=self._stream)
        return self._in_json

    def end(self) -> list[Event]:
        if self._step != self._first:
            return self._json.end() if self._json is not None else []
        text = self._text.strip()
        if not text:
            return super().end()
        found = written_calls(text, self._tools)
        if found is None and (call := calls.code_call(text, self._tools)) is not None:
            found = [call]
        if found is None:
            return super().end()
        return [event for call in found for event in (Started(call[0]), Arguments(call[1]))]


def written_calls(text: str, tools: Tools) -> list[calls.NamedCall] | None:
    return calls.json_calls(text, tools) or calls.python_calls(text, tools)
