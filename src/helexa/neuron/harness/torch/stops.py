"""Stop strings in a text that comes in pieces. Pure.

The first one to be complete, character by character, ends the text; of those that end at one character, the longest.
So it does not matter where the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """matched: the stop string that was found; nothing is fed after that."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What of the text so far is not part of a stop string, and cannot become one; each character once."""
        if not self._stops:
            return text
        self._held += text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            if (start := self._held.find(stop)) >= 0:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is not None:
            _, start, self.matched = found
            out, self._held = self._held[:start], ""
            return out
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def end(self) -> str:
        """What was held back, where no stop string came of it."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string; not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
