"""The one text among a function's arguments, decoded while they come: the input of a custom tool. Pure."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from helexa.core.bodies import NOT_JSON
from helexa.core.dialects.responses_tools import INPUT

_BEGIN: Final = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# What can be decoded without what follows it: plain characters, whole escapes, whole pairs of surrogates.
_WHOLE: Final = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)


class TextArgument:
    """Arguments in any cut in, pieces of the text out; together they are the text."""

    __slots__ = ("_began", "_ended", "_pending")

    def __init__(self) -> None:
        self._pending = ""
        self._began = self._ended = False

    def feed(self, arguments: str) -> str:
        if self._ended:
            return ""
        self._pending += arguments
        if not self._began:
            begin = _BEGIN.match(self._pending)
            if begin is None:
                return ""
            self._began = True
            self._pending = self._pending[begin.end() :]
        whole = _WHOLE.match(self._pending)
        assert whole is not None  # it matches nothing, too
        self._pending = self._pending[whole.end() :]
        self._ended = self._pending.startswith('"')
        return _text(whole.group())

    def end(self) -> str:
        """What is still to be said: all of it where the arguments are of another form than was asked for."""
        if self._began:
            return ""  # at most half a character is left
        try:
            found: Any = msgspec.json.decode(self._pending)
        except NOT_JSON:
            return self._pending
        text = found.get(INPUT) if isinstance(found, dict) else None
        return text if isinstance(text, str) else self._pending


def _text(inner: str) -> str:
    """JSON without its quotes. Engines' line breaks need no escape, and a lone half of a character is none."""
    if "\\" not in inner:
        return inner
    text: str = json.loads(f'"{inner}"', strict=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
