"""What a server's connections write within one turn of the loop: held while the turn reads, then written in one go.

Many requests, or the streams of one engine, whose step ends with a token for each of them, make turns with many reads.
Where each is followed by its write, every write finds its receiver asleep again and pays for waking it, and every read
finds the caches full of what writing needs. docs/decisions/0008-reads-first-then-writes.md has the figures. Bench:
bench/gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

MOST: Final = 32  # writes held at once: the first waits for what leads to the others, 10 to 25 us each
LARGE: Final = 64 << 10  # bytes; what is larger fills its receiver's buffer, and need not be in memory twice
FEW: Final = 4  # writes in a turn that are worth holding
VAIN: Final = 16  # turns in a row with fewer, after which
LET_BY: Final = 256  # are written at once, before it is tried again

Write: TypeAlias = Callable[[bytes], None]  # a transport's, bound once: it says which connection is meant


class Outbox:
    """Owned by its loop. Every connection's bytes leave in the order in which they came.

    held: writes of this turn. HOT: who finds it neither empty nor full may add to it himself, and else calls `put`
    """

    __slots__ = ("_call_soon", "_is_due", "_let_by", "_vain", "_written", "held")

    def __init__(self, call_soon: Callable[[Callable[[], None]], object] | None = None) -> None:
        """call_soon: the loop's; None: that of the loop it is used in."""
        self.held: list[tuple[Write, bytes]] = []
        self._call_soon = call_soon
        self._is_due = False  # the end of this turn will be told
        self._written = 0  # of what was held in this turn
        self._vain = 0
        self._let_by = 0

    def put(self, write: Write, data: bytes) -> None:
        """HOT, at least once a turn. Held until the turn ends, or written now."""
        held = self.held
        if self._let_by:
            self._let_by -= 1
            write(data)
            return
        if len(data) > LARGE:
            self.flush()
            write(data)
            return
        if len(held) >= MOST:
            self.flush()
        held.append((write, data))
        if not self._is_due:
            self._is_due = True
            call_soon = self._call_soon
            if call_soon is None:
                call_soon = self._call_soon = asyncio.get_running_loop().call_soon
            call_soon(self._end_turn)

    def flush(self) -> None:
        """Write what is held. Due before a connection is closed, or told that nothing follows."""
        if self.held:
            self._written += len(self.held)
            leaving = self.held[:]  # a write may lead to another, or to `drop`
            self.held.clear()
            self._write(iter(leaving))

    def drop(self, write: Write) -> None:
        """Its connection is gone."""
        if self.held:
            self.held[:] = [entry for entry in self.held if entry[0] is not write]

    def _write(self, leaving: Iterator[tuple[Write, bytes]]) -> None:
        try:
            for write, data in leaving:
                write(data)
        except BaseException:
            self._write(leaving)  # one connection's fault must not cost the others their bytes
            raise

    def _end_turn(self) -> None:
        self._is_due = False
        self.flush()
        if self._written >= FEW:
            self._vain = 0
        else:
            self._vain += 1
            if self._vain >= VAIN:
                self._vain, self._let_by = 0, LET_BY
        self._written = 0
