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
    stack, cut, in_string = _walk(text)
    before = text[:cut]
    whole = before + _closing(_walk(before)[0])
    return [whole] if in_string else [text.rstrip() + _closing(stack), whole]


def _closing(stack: list[str]) -> str:
    return "".join(reversed(stack))


def _walk(text: str) -> tuple[list[str], int, bool]:
    """What closes each bracket that is open at the end, the outermost first; where the last whole value ends; whether a
    string is open. It stops where the text is malformed, not cut off."""
    stack: list[str] = []
    in_string = escaped = False
    cut = 0
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
            cut = at + 1
        elif char in "}]":
            if not stack or stack.pop() != char:
                break
            cut = at + 1
        elif char == ",":
            cut = at
    return stack, cut, in_string
