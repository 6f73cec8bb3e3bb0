"""System messages as one, for chat templates that take one only at the beginning. Pure.

Agents put system messages between the others (Claude Code after the first user message, Codex two at the beginning).
Some templates raise an error then, some drop them without a word. Whether a model's does is found out by rendering
PROBE with it. Where it takes them as they stand, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from helexa.neuron.harness.openai_fields import Message

ROLES: Final = ("system", "developer")
_MARKS: Final = ("helexa-first", "helexa-second", "helexa-third")  # words that no template has of its own

# The places where agents were seen to put them.
PROBE: Final = msgspec.json.encode(
    {
        "messages": [
            {"role": "system", "content": _MARKS[0]},
            {"role": "system", "content": _MARKS[1]},
            {"role": "user", "content": "Hello"},
            {"role": "system", "content": _MARKS[2]},
        ]
    }
)


def are_shown(rendered: str) -> bool:
    """The template that rendered PROBE so shows every system message, in order."""
    places = [rendered.find(mark) for mark in _MARKS]
    return -1 not in places and places == sorted(places)


def stand_apart(messages: Sequence[Message]) -> bool:
    """HOT. There is a system message elsewhere than at the beginning."""
    return any(message.role in ROLES for message in messages[1:])


def merged(raw: bytes) -> bytes:
    """The `messages` of a request, as its raw JSON, with all system messages in the first: their contents in the order
    in which they came, and every other message where it was."""
    messages: list[dict[str, Any]] = msgspec.json.decode(raw)
    system = [message for message in messages if message["role"] in ROLES]
    rest = [message for message in messages if message["role"] not in ROLES]
    first = {**system[0], "content": _joined([message.get("content") for message in system])}
    return msgspec.json.encode([first, *rest])


def _joined(contents: Sequence[Any]) -> str | list[Any]:
    """Texts as one text, a blank line between; as parts where any has parts: how to join those is the template's."""
    if all(isinstance(content, str) or content is None for content in contents):
        return "\n\n".join(content for content in contents if content)
    parts: list[Any] = []
    for content in contents:
        parts += content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return parts
