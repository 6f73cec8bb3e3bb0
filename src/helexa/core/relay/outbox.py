"""What streams pass on within one turn of the loop: held while the turn reads, then written in one go.

An engine's step ends with a token for each of its sequences, so that a turn has many reads. Where each is followed by
its write, every write finds its receiver asleep again and pays for waking it, and every read finds the caches full of
what writing needs. docs/decisions/0008-reads-first-then-writes.md has the figures. Bench: bench/gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias

MOST: Final = 32  # reads held at once: the first waits for the others, some 10 us each
FEW: Final = 4  # reads in a turn that are worth holding
VAIN: Final = 16  # turns in a row with fewer, after which
LET_BY: Final = 64  # reads are written at once, before it is tried again


class Sender(Protocol):
    """A connection whose reads go on as they come. write: to whom."""

    @property
    def write(self) -> Callable[[bytes], None] | None: ...


Held: TypeAlias = tuple[Sender, bytes]


class Outbox:
    """Of one upstream; owned by its loop. Every sender's bytes leave in the order in which they came.

    held: reads of this turn. HOT: who finds it neither empty nor full adds to it himself, and else calls `take`
    """

    __slots__ = ("_call_soon", "_is_due", "_let_by", "_vain", "_written", "held")

    def __init__(self, call_soon: Callable[[Callable[[], None]], object] | None = None) -> None:
        """call_soon: the loop's; None: that of the loop it is used in."""
        self.held: list[Held] = []
        self._call_soon = call_soon
        self._is_due = False  # the end of this turn will be told
        self._written = 0  # of what was held in this turn
        self._vain = 0
        self._let_by = 0

    def take(self, sender: Sender, data: bytes) -> None:
        """HOT, at least once a turn. Held until the turn ends, or written now."""
        if self._let_by:
            self._let_by -= 1
            sender.write(data)  # type: ignore[misc]
            return
        if len(self.held) >= MOST:
            self.flush()
        self.held.append((sender, data))
        if not self._is_due:
            self._is_due = True
            call_soon = self._call_soon
            if call_soon is None:
                call_soon = self._call_soon = asyncio.get_running_loop().call_soon
            call_soon(self._end_turn)

    def flush(self) -> None:
        """Write what is held. Due before anything else is written to one of the receivers."""
        if self.held:
            self._written += len(self.held)
            leaving = self.held[:]  # a write may lead to `drop`
            self.held.clear()
            self._write(iter(leaving))

    def drop(self, sender: Sender) -> None:
        """Its receiver is gone."""
        self.held[:] = [entry for entry in self.held if entry[0] is not sender]

    def _write(self, leaving: Iterator[Held]) -> None:
        try:
            for sender, data in leaving:
                sender.write(data)  # type: ignore[misc]
        except BaseException:
            self._write(leaving)  # one receiver's fault must not cost the others their bytes
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
