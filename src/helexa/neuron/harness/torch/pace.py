"""How many prompt tokens one step computes, so that none takes long: a cancel is heard between two steps, and answers
under way wait for the prompts beside them. Pure."""

from __future__ import annotations

from typing import Final

TARGET_S: Final = 0.25  # of a step; a cancel has to be heard within 0.5 s
BESIDE_ANSWERS: Final = 0.5  # of that, where answers wait for it
LEAST: Final = 32  # tokens; below some 20, a step on a CPU is mostly the reading of the weights
FIRST: Final = 32  # before anything is measured: 0.4 s where 80 tokens a second are computed
WEIGHT: Final = 0.5  # of the newest measurement, where it is the faster one; a slower one counts at once


class Pace:
    """most: tokens, whatever was measured."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known = min(most, FIRST)  # a step of so many tokens goes well, or nothing is known yet
        self._token_s: float | None = None
        self._steps = 0
        self._allowed = 0

    def chunk(self, *, answers: bool) -> int:
        """answers: some are under way."""
        wanted = self._known
        if self._token_s is not None:
            wanted = int(TARGET_S * (BESIDE_ANSWERS if answers else 1.0) / self._token_s)
        self._allowed = max(min(LEAST, self._most), min(self._most, 2 * self._known, wanted))
        return self._allowed

    def saw(self, tokens: int, seconds: float) -> None:
        """A step of this many prompt tokens took so long."""
        if tokens * 2 < self._allowed or not tokens:
            return  # the end of a prompt: it tells of the weights' reading rather
        self._steps += 1
        if self._steps == 1:
            return  # the first step of all warms things up
        now = max(seconds, 1e-6) / tokens
        if self._token_s is None or now > self._token_s:
            self._token_s = now
        else:
            self._token_s += WEIGHT * (now - self._token_s)
        self._known = max(self._known, tokens)
