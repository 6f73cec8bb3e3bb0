"""Ollama's messages as the neuron's. Pure.

Ollama's calls and results need no ids, the chat dialect's do: a call gets one, and a result that names none belongs to
the first call of its name that has no result yet.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helexa.core.bodies import NOT_JSON
from helexa.core.dialects import ollama_wire as wire
from helexa.core.errors import BadRequest

_ROLES: Final = ("system", "user", "assistant", "tool")
# The first bytes of each kind of picture, as base64 begins.
_PICTURES: Final = (("iVBORw0KGgo", "png"), ("/9j/", "jpeg"), ("R0lGOD", "gif"), ("UklGR", "webp"), ("Qk", "bmp"))


def bad(param: str, what: str) -> BadRequest:
    return BadRequest(f"`{param}` {what}.", param=param)


def messages(asked: Sequence[wire.Message]) -> list[dict[str, Any]]:
    """Raises BadRequest."""
    made: list[dict[str, Any]] = []
    open_calls = _OpenCalls()
    calls = 0
    for i, message in enumerate(asked):
        where = f"messages[{i}]"
        if message.role not in _ROLES:
            found = f"{message.role!r} is not known; use one of {', '.join(_ROLES)}" if message.role else "is required"
            raise bad(f"{where}.role", found)
        if message.role == "tool":
            made.append(_result(message, open_calls))
            continue
        told: dict[str, Any] = {"role": message.role, "content": content(message.content, message.images)}
        if message.role == "assistant":
            open_calls = _OpenCalls()
            if message.thinking:
                told["reasoning_content"] = message.thinking
            if message.tool_calls:
                told["tool_calls"] = []
                for j, call in enumerate(message.tool_calls):
                    made_call = _call(call, calls, f"{where}.tool_calls[{j}]")
                    calls += 1
                    open_calls.add(made_call["id"], made_call["function"]["name"])
                    told["tool_calls"].append(made_call)
                told["content"] = told["content"] or None
        made.append(told)
    return made


def content(text: str | None, images: Sequence[str] | None) -> str | list[dict[str, Any]]:
    """Pictures come before the text, as Ollama puts them."""
    if not images:
        return text or ""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/{_kind(image)};base64,{image}"}} for image in images
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _kind(image: str) -> str:
    return next((kind for begin, kind in _PICTURES if image.startswith(begin)), "jpeg")


def _call(call: wire.ToolCall, number: int, where: str) -> dict[str, Any]:
    function = call.function
    if function is None or not function.name:
        raise bad(f"{where}.function.name", "is required")
    # nine letters and digits: Mistral's template takes no other
    return {
        "id": call.id or f"call{number:05d}",
        "type": "function",
        "function": {"name": function.name, "arguments": _arguments(function.arguments, f"{where}.function.arguments")},
    }


def _arguments(raw: msgspec.Raw, where: str) -> str:
    """As the text that the chat dialect wants. Some clients send OpenAI's text as it is."""
    text = bytes(raw).decode("utf-8", "replace") or "{}"
    if text.startswith('"'):
        text = msgspec.json.decode(text)
        try:
            if not isinstance(msgspec.json.decode(text or "{}"), dict):
                raise bad(where, "must be an object")
        except NOT_JSON:
            raise bad(where, "must be an object") from None
        return text or "{}"
    if text == "null":
        return "{}"
    if not text.startswith("{"):
        raise bad(where, "must be an object")
    return text


@dataclass(slots=True)
class _Call:
    id: str
    has_result: bool = False


class _OpenCalls:
    """An assistant's calls that have no result yet, in their order. What has its result leaves each queue when its turn
    comes there, so that all results together cost no more than all calls."""

    def __init__(self) -> None:
        self._all: deque[_Call] = deque()
        self._by_id: defaultdict[str, deque[_Call]] = defaultdict(deque)
        self._by_name: defaultdict[str, deque[_Call]] = defaultdict(deque)

    def add(self, call_id: str, name: str) -> None:
        call = _Call(call_id)
        for queue in (self._all, self._by_id[call_id], self._by_name[name]):
            queue.append(call)

    def take(self, call_id: str | None, name: str | None) -> str | None:
        """The id of the first call of this id, else of this name, else of all. None where no call is open."""
        for queue in (self._by_id.get(call_id or ""), self._by_name.get(name or ""), self._all):
            while queue:
                call = queue.popleft()
                if not call.has_result:
                    call.has_result = True
                    return call.id
        return None


def _result(message: wire.Message, open_calls: _OpenCalls) -> dict[str, Any]:
    found = open_calls.take(message.tool_call_id, message.tool_name)
    told: dict[str, Any] = {
        "role": "tool",
        "tool_call_id": message.tool_call_id or found or "call00000",
        "content": content(message.content, message.images),
    }
    if message.tool_name:
        told["name"] = message.tool_name
    return told
