"""gpt-oss' format: an answer is several messages, each with a channel and perhaps someone it is for. Pure.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

The channel analysis is reasoning, all others are content; a message to functions.NAME is a call. The prompt ends within
the first message's head (or its text, where an answer is gone on with).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from helexa.neuron.harness.answers import calls
from helexa.neuron.harness.answers.machine import Told
from helexa.neuron.harness.answers.pieces import Piece, Tools, new_call_id
from helexa.neuron.harness.answers.scanning import JsonEnd, NotJson, first_of, may_begin

START: Final = "<|start|>"
MESSAGE: Final = "<|message|>"
ENDS: Final = ("<|end|>", "<|return|>", "<|call|>", START)
_HEAD_BEGINS: Final = ("<|channel|>", "<|constrain|>", "to=", MESSAGE)
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_FOR: Final = re.compile(r"\bto=([^\s<]+)")
_ROLE: Final = "assistant"  # behind the start of a message that is not the first
_HEAD: Final = 400  # characters
_FUNCTIONS: Final = "functions."


class HarmonyParser:
    """prompt: its end is read, for where the answer begins. stream: a grammar holds the arguments of calls."""

    def __init__(
        self,
        tools: Tools,
        *,
        prompt: str = "",
        stream: bool = False,
        call_id: Callable[[int], str] = new_call_id,
    ) -> None:
        self._tools = tools
        self._stream = stream
        self._told = Told(call_id)
        self._text = ""
        self._kind = "content"  # of the message: reasoning | content | call | streamed
        self._name = ""
        self._raw = ""  # the head of the message, for a call that is none
        self._arguments: list[str] = []
        self._object: JsonEnd | None = None  # of streamed arguments
        self._is_over = False
        self._step: Callable[[], Any] = self._head
        begun = prompt.rpartition(START)[2]
        if MESSAGE in begun:
            self._open(begun.partition(MESSAGE)[0])

    def feed(self, text: str) -> Sequence[Piece]:
        self._text += text
        while self._step():
            pass
        return self._told.take()

    def end(self) -> Sequence[Piece]:
        if self._step == self._message:
            self._tell(self._text)
            self._close()
        elif self._step == self._head and not _CHANNEL.search(self._text):
            self._told.content(self._text)
        self._told.finish()
        return self._told.take()

    def _head(self) -> bool:
        head, found, rest = self._text.partition(MESSAGE)
        begins = head.removeprefix(_ROLE).lstrip()
        is_head = _ROLE.startswith(head) or any(begins.startswith(b) or b.startswith(begins) for b in _HEAD_BEGINS)
        if not is_head or len(head) > _HEAD + (0 if found else len(MESSAGE) - 1):
            self._kind = "content"  # a message that begins without one
            self._step = self._message
            return True
        if not found:
            return False
        self._text = rest
        self._open(head)
        return True

    def _open(self, head: str) -> None:
        channel = _CHANNEL.search(head)
        to = _FOR.search(head)
        name = to.group(1).removeprefix(_FUNCTIONS) if to is not None else ""
        self._raw = head + MESSAGE
        self._arguments = []
        self._object = None
        self._is_over = False
        self._step = self._message
        if name in self._tools:
            self._name = name
            self._kind = "streamed" if self._stream else "call"
            if self._stream:
                self._told.start(name)
        else:
            self._kind = "reasoning" if channel is not None and channel.group(1) == "analysis" else "content"

    def _message(self) -> bool:
        found = first_of(self._text, ENDS)
        size = found[0] if found is not None else len(self._text) - may_begin(self._text, ENDS)
        self._tell(self._text[:size])
        self._text = self._text[size:]
        if found is None:
            return False
        self._text = self._text[len(found[1]) :]
        self._close()
        self._step = self._head if found[1] == START else self._between
        return True

    def _between(self) -> bool:
        """After a message's end: the next one's start, and nothing else."""
        text = self._text.lstrip()
        if text.startswith(START):
            self._text = text[len(START) :]
            self._step = self._head
            return True
        if START.startswith(text):
            return False
        self._step = self._head
        return True

    def _tell(self, text: str) -> None:
        if not text:
            return
        if self._kind == "reasoning":
            self._told.reasoning(text)
        elif self._kind == "content":
            self._told.content(text)
        elif self._kind == "streamed":
            self._stream_arguments(text)
        else:
            self._arguments.append(text)

    def _stream_arguments(self, text: str) -> None:
        """As much of it as belongs to the arguments' object."""
        if self._object is None:
            text = text.lstrip()
            if not text.startswith("{"):
                return
            self._object = JsonEnd()
        if self._is_over:
            return
        try:
            end = self._object.feed(text)
        except NotJson:
            end = 0
        self._is_over = end >= 0
        if shown := text if end < 0 else text[:end]:
            self._told.arguments(shown)

    def _close(self) -> None:
        if self._kind == "call":
            text = "".join(self._arguments)
            if (arguments := calls.object_text(text)) is not None:
                self._told.start(self._name)
                self._told.arguments(arguments)
            else:
                self._told.content(self._raw + text)
        elif self._kind == "reasoning":
            self._told.end_thoughts()
