"""The arguments of a call that the token limit cut off: what of them is whole. Pure.

As Anthropic's own SDK reads them (jiter's partial mode): complete members stay, the one that was being written goes.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helexa.core.bodies import NOT_JSON

_CLOSES: Final = {"{": "}", "[": "]"}


def partial_object(text: str) -> msgspec.Raw | dict[str, Any]:
    """`text` as it is where it is a whole JSON object, so that its numbers stay what they were; else as much of it as
    is whole, and {} where nothing is."""
    try:
        if isinstance(msgspec.json.decode(text), dict):
            return msgspec.Raw(text.encode())
    except NOT_JSON:
        pass
    for whole in _candidates(text):
        try:
            found = msgspec.json.decode(whole)
        except NOT_JSON:
            continue
        return found if isinstance(found, dict) else {}
    return {}


def _candidates(text: str) -> list[str]:
    """The text cut behind its last whole value, its brackets closed; the longest first, two at most: the value before a
    comma or an opened bracket, and the text's own end (a literal or a string that is whole there)."""
    stack: list[str] = []
    in_string = escaped = False
    cut, closing = 0, ""
    for at, char in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            stack.append(_CLOSES[char])
            cut, closing = at + 1, "".join(reversed(stack))
        elif char in "}]":
            if not stack or stack.pop() != char:
                break  # malformed, not cut off
            cut, closing = at + 1, "".join(reversed(stack))
        elif char == ",":
            cut, closing = at, "".join(reversed(stack))
    end = text.rstrip() + "".join(reversed(stack))
    return [end, text[:cut] + closing] if not in_string else [text[:cut] + closing]
