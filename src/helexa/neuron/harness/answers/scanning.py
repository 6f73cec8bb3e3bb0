"""Reading text that has not come whole: where a JSON value ends, and what may yet become a marker. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_IN_STRING: Final = re.compile(r'[^"\\]*')
_OUTSIDE: Final = re.compile(r"[\s,:0-9a-zA-Z+.\-]*")  # what may stand between strings and brackets


class NotJson(Exception):
    """What was read cannot be a JSON value any more."""


class JsonEnd:
    """Finds the end of a JSON object or array. depth: brackets that are open already."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def feed(self, text: str, start: int = 0) -> int:
        """HOT. The index behind the value's last bracket, or -1 while it goes on. The first character that is fed is
        a bracket unless one is open already. Raises NotJson."""
        at, size = start, len(text)
        while at < size:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            at = (_IN_STRING if self._in_string else _OUTSIDE).match(text, at).end()  # type: ignore[union-attr]
            if at == size:
                break
            char = text[at]
            at += 1
            if char == '"':
                self._in_string = not self._in_string
            elif self._in_string:  # a backslash
                self._escaped = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at
            else:
                raise NotJson
        return -1


def may_begin(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    most = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), most, -1):
            if text.endswith(marker[:size]):
                most = size
                break
    return most


def first_of(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the first marker stands, the longest where two begin at one place."""
    found: tuple[int, str] | None = None
    for marker in markers:
        at = text.find(marker)
        if at >= 0 and (found is None or at < found[0] or (at == found[0] and len(marker) > len(found[1]))):
            found = at, marker
    return found
