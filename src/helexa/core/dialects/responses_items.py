"""Items of a request's input as `GET /v1/responses/{id}/input_items` lists them and the store keeps them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from helexa.core.bodies import try_decode

_encode = msgspec.json.Encoder().encode
_PREFIXES: Final = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


class _Input(msgspec.Struct):
    input: str | list[dict[str, Any]] | None = None


_input = msgspec.json.Decoder(_Input)


def try_listed(body: bytes, key: str) -> bytes | None:
    """The input of a request body that was read before, as a JSON list of items that each have an id, a type and, where
    their type has one, a status.   key: the response's part of all ids.   None where a field that reading the request
    skips holds what cannot be read: a number beyond all floats, a list too deep."""
    read = try_decode(_input, body)
    if read is None:
        return None
    given = read.input
    items: Sequence[dict[str, Any]]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    return _encode([_listed(item, f"{key}i{i}") for i, item in enumerate(items)])


def _listed(item: dict[str, Any], number: str) -> dict[str, Any]:
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    made = {**item, "type": kind}
    if not made.get("id"):
        made["id"] = f"{_PREFIXES.get(kind, 'item')}_{number}"
    if kind != "item_reference" and kind != "reasoning":
        made["status"] = item.get("status") or "completed"
    if kind == "message":
        made["content"] = _parts(made.get("content"), made.get("role"))
    return made


def _parts(content: Any, role: Any) -> Any:
    if isinstance(content, str):
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    return [
        {"annotations": [], "logprobs": [], **part} if part.get("type") == "output_text" else part
        for part in content or ()
    ]
