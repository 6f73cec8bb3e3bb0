"""What one rendering may cost: CPU time, and how much text and data it may make. Pure but for the thread's clock.

Everything that a template makes is charged before it is made where its size can be foreseen, else at once after; so
memory is bounded by MADE, whatever the template keeps. What no step makes (a C loop over what is there) is bounded by
the size of what is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

CPU_S: Final = 2.0  # a conversation of 1,000 messages with 24 tools takes some 0.05 s
MADE: Final = 1 << 28  # characters; some templates build their text anew with each message
RENDERED: Final = 1 << 26  # characters of the prompt itself: the largest body that a gateway takes
ITEM: Final = 64  # characters that an item of a list or mapping counts for: what it takes of memory
BITS: Final = 1 << 14  # of a whole number
_CLOCK_EVERY: Final = 64  # steps; the thread's clock takes 0.3 us


class TooExpensive(Exception):
    """The template went beyond its bounds. str() says which."""


class Budget:
    """Belongs to the thread that renders."""

    __slots__ = ("_cpu_s", "_deadline", "_left", "_made", "_steps", "_weights")

    def __init__(self, cpu_s: float = CPU_S, made: int = MADE) -> None:
        self._cpu_s = cpu_s
        self._made = made
        self._deadline = time.thread_time() + cpu_s
        self._left = made
        self._steps = 0
        self._weights: dict[int, tuple[Any, int]] = {}  # by id, which the kept value holds; values are never changed

    def step(self, chars: int = 0) -> None:
        """HOT. One turn of a loop, one call, one output; chars: what it makes."""
        self._left -= chars
        if self._left < 0:
            raise self._too_much()
        self._steps += 1
        if not self._steps % _CLOCK_EVERY and time.thread_time() > self._deadline:
            raise TooExpensive(f"it takes more than {self._cpu_s:g} s of CPU time")

    def check_room(self, chars: int) -> None:
        """Before making what may be so large; it is charged when it is made."""
        if chars > self._left:
            raise self._too_much()

    def _too_much(self) -> TooExpensive:
        return TooExpensive(f"it makes more than {self._made >> 20} Mi characters")

    def made(self, value: Any) -> Any:
        """HOT. Charge a value that a call or an operator gave; returns it."""
        if isinstance(value, (str, bytes)):
            self.step(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.step(len(value) * ITEM)
            self.check_room(self.weight(value))
        else:
            self.step()
        return value

    def weight(self, value: Any) -> int:
        """About the characters of str(value), however often a part stands in it. O(parts) once for each container."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 32
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        weight = 2 + len(value) * 4
        for item in value:
            weight += self.weight(item)
        if isinstance(value, dict):
            for item in value.values():
                weight += self.weight(item)
        self._weights[id(value)] = (value, weight)
        return weight


_local = threading.local()


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Within, what this thread renders is charged to `budget`."""
    _local.budget = budget
    try:
        yield
    finally:
        del _local.budget


def current() -> Budget:
    """Raises TooExpensive outside a rendering: nothing of a template is worked out while it is compiled."""
    try:
        budget: Budget = _local.budget
    except AttributeError:
        raise TooExpensive("nothing is computed before rendering") from None
    return budget
