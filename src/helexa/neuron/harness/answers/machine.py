"""The machine that reads an answer: thoughts first, then text in which markers begin calls. Pure.

Form says how a family of models writes; harmony has a machine of its own. White space around thoughts and calls is no
content; content without either stays as it was written, to the character.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from helexa.neuron.harness.answers.blocks import Arguments, Block, Event, Started, Text
from helexa.neuron.harness.answers.pieces import (
    CallArguments,
    CallStarted,
    Content,
    Piece,
    Reasoning,
    Tools,
    new_call_id,
)
from helexa.neuron.harness.answers.scanning import first_of, may_begin

_BETWEEN_CALLS: Final = " \t\r\n;"

OpenBlock = Callable[[str, Tools, bool], Block]  # the marker, the tools, whether a grammar holds the arguments


@dataclass(frozen=True, slots=True)
class Form:
    """think:  the marks around thoughts. They stand at the beginning of an answer, or the prompt's end opened them
    openings:  marks that begin calls
    silent:    marks around calls, which say nothing
    bare:      a call may stand at the beginning of an answer without a mark, as a JSON object
    """

    think: tuple[str, str] | None = ("<think>", "</think>")
    openings: Mapping[str, OpenBlock] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    bare: OpenBlock | None = None


class Told:
    """The pieces of an answer, numbered, without the white space that is no content."""

    def __init__(self, call_id: Callable[[int], str] = new_call_id) -> None:
        self._call_id = call_id
        self._pieces: list[Piece] = []
        self._held = ""  # white space that is content only if more follows
        self._kind: type[Reasoning] | type[Content] | None = None
        self._apart = False  # thoughts or calls came before, so that leading white space is none of content's
        self.calls = 0

    def reasoning(self, text: str) -> None:
        self._add(Reasoning, text)
        self._apart = True

    def content(self, text: str) -> None:
        self._add(Content, text)

    def _add(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if kind is not self._kind:
            self._held = ""
            if kind is Reasoning or self._apart:
                text = text.lstrip()
            if not text:
                return
            self._kind = kind
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._pieces.append(kind(shown))

    def event(self, event: Event) -> None:
        match event:
            case Text(text):
                self.content(text)
            case Started(name):
                self.start(name)
            case Arguments(text):
                self.arguments(text)

    def start(self, name: str) -> None:
        self._held = ""
        self._kind = None
        self._apart = True
        self._pieces.append(CallStarted(self.calls, self._call_id(self.calls), name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        self._pieces.append(CallArguments(self.calls - 1, text))

    def end_thoughts(self) -> None:
        """White space around them is none of theirs, and none of content's."""
        self._held = ""
        self._kind = None
        self._apart = True

    def finish(self) -> None:
        """Trailing white space belongs to content that no call follows."""
        if self._held and self._kind is Content and not self.calls:
            self._pieces.append(Content(self._held))
        self._held = ""

    def take(self) -> Sequence[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


class TextParser:
    """tools: what may be called; none: markers of calls are text.
    thinking: the prompt's end opened the thoughts.
    stream: a grammar holds the arguments, so that they can be told as they come.
    """

    def __init__(
        self,
        form: Form,
        tools: Tools,
        *,
        thinking: bool = False,
        stream: bool = False,
        call_id: Callable[[int], str] = new_call_id,
    ) -> None:
        self._think = form.think
        self._openings = form.openings if tools else {}
        self._silent = form.silent if tools else ()
        self._markers = (*self._openings, *self._silent)
        self._bare = form.bare if tools else None
        self._tools = tools
        self._stream = stream
        self._told = Told(call_id)
        self._text = ""
        self._block: Block | None = None
        self._at_start = True  # no content yet
        self._step: Callable[[], Any] = self._thoughts if thinking else self._before

    def feed(self, text: str) -> Sequence[Piece]:
        self._text += text
        while self._step():
            pass
        return self._told.take()

    def end(self) -> Sequence[Piece]:
        if self._block is not None:
            for event in self._block.end():
                self._told.event(event)
        elif self._step == self._thoughts:
            self._told.reasoning(self._text)
        elif self._text:
            self._told.content(self._text)
        self._told.finish()
        return self._told.take()

    # steps: whether the next one can go on

    def _before(self) -> bool:
        """Thoughts or not?"""
        if self._think is not None:
            text = self._text.lstrip()
            mark = self._think[0]
            if text.startswith(mark):
                self._text = text[len(mark) :]
                self._step = self._thoughts
                return True
            if mark.startswith(text):
                return False
        self._step = self._content
        return True

    def _thoughts(self) -> bool:
        assert self._think is not None
        mark = self._think[1]
        thoughts, found, rest = self._text.partition(mark)
        if not found:
            size = len(self._text) - may_begin(self._text, (mark,))
            thoughts, rest = self._text[:size], self._text[size:]
        if thoughts:
            self._told.reasoning(thoughts)
        self._text = rest
        if found:
            self._told.end_thoughts()
            self._step = self._content
        return bool(found)

    def _content(self) -> bool:
        if self._bare is not None and self._at_start:
            text = self._text.lstrip(_BETWEEN_CALLS if self._told.calls else None)
            if not text:
                return False
            if text[0] == "{":
                before, self._text = self._text[: -len(text)], text
                return self._open(before, self._bare)
        found = first_of(self._text, self._markers)
        if found is None:
            size = len(self._text) - may_begin(self._text, self._markers)
            self._tell(self._text[:size])
            self._text = self._text[size:]
            return False
        at, mark = found
        self._tell(self._text[:at])
        self._text = self._text[at + len(mark) :]
        if mark in self._silent:
            return True
        return self._open(mark, self._openings[mark])

    def _tell(self, text: str) -> None:
        if text:
            self._told.content(text)
            self._at_start = self._at_start and not text.strip()

    def _open(self, mark: str, opened: OpenBlock) -> bool:
        self._block = opened(mark, self._tools, self._stream)
        self._step = self._in_block
        return True

    def _in_block(self) -> bool:
        assert self._block is not None
        text, self._text = self._text, ""
        for event in self._block.feed(text):
            self._told.event(event)
            self._at_start = self._at_start and not isinstance(event, Text)
        if self._block.rest is None:
            return False
        self._text = self._block.rest
        self._block = None
        self._step = self._content
        return True
