"""Messages as chat templates know them, where the wire has them otherwise. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_NINE: Final = re.compile(r"[A-Za-z0-9]{9}")

Message = dict[str, Any]


def with_mappings(message: Message, *, nine: bool = False) -> Message:
    """The arguments of its calls as objects, which templates go through by name; on the wire they are text. What is no
    object's text (a call that was cut off) stays as it is. nine: ids as `wants_nine` says."""
    made = dict(message)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [_call(call, nine) for call in calls]
    if nine and isinstance(call_id := message.get("tool_call_id"), str):
        made["tool_call_id"] = nine_of(call_id)
    return made


def wants_nine(template: str) -> bool:
    """Mistral's templates refuse an id of a call that is not nine letters and digits."""
    return "[TOOL_CALLS]" in template and re.search(r"length\s*!=\s*9", template) is not None


def nine_of(call_id: str) -> str:
    """The same for a call and its result, and in each turn, so that the prompt's beginning stays as it was."""
    return call_id if _NINE.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _call(call: Mapping[str, Any], nine: bool) -> Message:
    made = dict(call)
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(arguments := function.get("arguments"), str):
        made["function"] = {**function, "arguments": _object(arguments)}
    if nine and isinstance(call_id := call.get("id"), str):
        made["id"] = nine_of(call_id)
    return made


def _object(text: str) -> Any:
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
