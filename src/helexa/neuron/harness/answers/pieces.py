"""What an answer is made of, in the order in which it is told. Pure values."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """name: of one of the request's tools. index: counts the calls of an answer, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are the text of a JSON object; it is whole unless the answer was cut off."""

    index: int
    text: str


Piece = Reasoning | Content | CallStarted | CallArguments
Tools = Mapping[str, Mapping[str, Any] | None]  # the functions that may be called -> JSON schema of their parameters


class Parser(Protocol):
    """Of one answer. Belongs to one thread."""

    def feed(self, text: str) -> Sequence[Piece]:
        """HOT, once for each token. What can be told now."""

    def end(self) -> Sequence[Piece]:
        """The answer ended, by itself or cut off: what was held back."""


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Whole:
    """An answer collected."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)


def collect(pieces: Iterable[Piece]) -> Whole:
    whole = Whole()
    for piece in pieces:
        match piece:
            case Reasoning(text):
                whole.reasoning += text
            case Content(text):
                whole.content += text
            case CallStarted(_, call_id, name):
                whole.calls.append(Call(call_id, name))
            case CallArguments(index, text):
                whole.calls[index].arguments += text
    return whole


def new_call_id(index: int) -> str:
    return f"call_{secrets.token_hex(12)}"
