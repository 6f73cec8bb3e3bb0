"""A queue that is fair between clients: they take turns, and none may fill it. Pure."""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Final, Generic, TypeVar

T = TypeVar("T")

SHARE: Final = 2
RETRY_AFTER_S: Final = 5  # where nobody knows how long it takes
RETRY_AFTER_MOST_S: Final = 60


def has_share(room: int, waiting: int, own: int) -> bool:
    """May a client that has `own` of the `waiting` put one more into a queue for `room`? It may have up to SHARE times
    as many as are free (Choudhury and Hahne's dynamic threshold): one alone fills two thirds of the queue, the more
    clients wait the less each may have, and there is always a place for one that has none yet.
    """
    return own < SHARE * (room - waiting)


def retry_after_s(waiting: int, per_s: float | None) -> int:
    """When those who wait will have been served, at so many a second."""
    return RETRY_AFTER_S if not per_s else max(1, min(RETRY_AFTER_MOST_S, ceil(waiting / per_s)))


class FairQueue(Generic[T]):
    """Each client's own in order of arrival; between clients by turns, so that a hundred requests of one do not stand
    before everybody else's one."""

    def __init__(self) -> None:
        self._turns: deque[str] = deque()  # clients with something here, whose turn it is first
        self._lines: dict[str, deque[T]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def own(self, client: str) -> int:
        line = self._lines.get(client)
        return len(line) if line is not None else 0

    def add(self, client: str, item: T) -> None:
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = deque()
            self._turns.append(client)
        line.append(item)
        self._count += 1

    def first(self) -> T | None:
        """Whose turn it is; stays."""
        return self._lines[self._turns[0]][0] if self._turns else None

    def pop(self) -> T:
        """Whose turn it is; goes, and its client is the last again. Not for an empty queue."""
        client = self._turns.popleft()
        line = self._lines[client]
        item = line.popleft()
        self._count -= 1
        if line:
            self._turns.append(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: T) -> None:
        """Out of turn; nothing where it has gone already."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return
        line.remove(item)
        self._count -= 1
        if not line:
            del self._lines[client]
            self._turns.remove(client)
