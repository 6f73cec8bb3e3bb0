"""Whose keys and values are kept, and which of them a new prompt can go on from. Pure accounting: it moves no data.

Memory is counted in blocks of BLOCK tokens. A slab holds the keys and values of one run of tokens, from position 0. It
is busy while a sequence computes in it; afterwards it stays, idle, as an entry of the prefix cache, answer included,
until a sequence adopts it, copies from it, or its memory is wanted (the least recently used goes first).

A slab never gives blocks back while it lives: where it is cut short, the memory behind it is still there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import xxhash

from helexa.neuron.harness.torch.step import Copy

BLOCK: Final = 64
CANDIDATES: Final = 8  # slabs compared token by token in one search; more of them differ after the same block
COPY_PER_COMPUTE: Final = 8  # copying a token's keys and values costs at most 1/8 of computing them
GROWTH: Final = (
    1.25  # a slab that grows may have to be moved: often enough to waste little, seldom enough to cost little
)


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Chain:
    """Tokens that only grow at their end, with a hash for each whole block of them and all before it."""

    __slots__ = ("_hashes", "tokens")

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = list(tokens)
        self._hashes: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        self.tokens.append(token)

    def hashes(self, tokens: int) -> list[int]:
        """Of the whole blocks among the first `tokens`."""
        count = min(tokens, len(self.tokens)) // BLOCK
        for block in range(len(self._hashes), count):
            before = self._hashes[-1] if self._hashes else 0
            data = array("q", self.tokens[block * BLOCK : (block + 1) * BLOCK]).tobytes()
            self._hashes.append(xxhash.xxh3_64_intdigest(data, seed=before))
        return self._hashes[:count]

    def common(self, other: Chain, most: int) -> int:
        """How many of the first `most` tokens are the same in both."""
        most = min(most, len(self.tokens), len(other.tokens))
        if self.tokens[:most] == other.tokens[:most]:
            return most
        low, high = 0, most  # the first `low` are the same, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            if self.tokens[low:middle] == other.tokens[low:middle]:
                low = middle
            else:
                high = middle
        return low


@dataclass(eq=False, slots=True)
class Slab:
    """held: how many of the chain's tokens it has the keys and values of. blocks: what it is charged with.
    pins: copies out of it in the step that is being made, before which it must not go."""

    number: int
    chain: Chain
    held: int
    blocks: int
    busy: bool = True
    used: int = 0
    pins: int = 0
    indexed: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Opened:
    """A busy slab for a sequence that has `cached` tokens already, some of them by `copy`."""

    slab: Slab
    cached: int
    copy: Copy | None


class Pool:
    """All slabs of one model, within `capacity` blocks."""

    def __init__(self, kv_tokens: int) -> None:
        self.capacity = kv_tokens // BLOCK
        self.slabs: dict[int, Slab] = {}
        self.used = 0  # blocks
        self._index: dict[int, dict[int, Slab]] = {}  # by a block's hash: the slabs that hold it, by number
        self._drops: list[int] = []
        self._pinned: list[Slab] = []
        self._next = 0
        self._clock = 0

    def begin(self) -> None:
        """A new step is made; the copies of the last one have been carried out."""
        for slab in self._pinned:
            slab.pins = 0
        self._pinned.clear()

    def take_drops(self) -> list[int]:
        """Numbers of slabs that went since the last call."""
        drops, self._drops = self._drops, []
        return drops

    def open(self, chain: Chain, *, room: int = 0, spare: int = 0, cache: bool = True) -> Opened | None:
        """A slab with room for all of the chain, or for `room` tokens if that is more, from as much of the chain's
        beginning as is held anywhere; at least the last token is left to compute. spare: blocks that must remain to be
        had afterwards. None, with nothing changed but the order of use, where there is no room.

        1. Nothing of use is held, or `cache` is off: a new slab.
        2. The slab that holds most is idle, and little of it would be lost: adopted.
        3. A copy, if there is room for it: at its price where that is free, else only where more would be lost than
           is copied. A busy slab can only be copied.
        4. Adopted, if it is idle; else a new slab.
        """
        need = blocks_for(max(room, len(chain)))
        found, cached = self._find(chain) if cache else (None, 0)
        if found is not None:
            loss = found.held - cached
            if not found.busy and loss < BLOCK:
                return self._adopt(found, chain, cached, need, spare)
            free = self.capacity - self.used >= need + spare
            if found.busy or (loss * COPY_PER_COMPUTE >= cached if free else loss > cached):
                found.pins += 1
                self._pinned.append(found)
                if self._make_room(need, spare):
                    slab = self._new(chain, cached, need)
                    return Opened(slab, cached, Copy(found.number, slab.number, cached, need * BLOCK))
                found.pins -= 1
                self._pinned.pop()
            if not found.busy:
                return self._adopt(found, chain, cached, need, spare)
        if not self._make_room(need, spare):
            return None
        return Opened(self._new(chain, 0, need), 0, None)

    def grow(self, slab: Slab, tokens: int, most: int) -> bool:
        """Room in a busy slab for this many tokens in all, and, if it is free, for some of those that may follow, up to
        `most`. False, with nothing changed, where there is none."""
        least = blocks_for(tokens) - slab.blocks
        if least <= 0:
            return True
        wanted = min(int(slab.blocks * GROWTH) + 1, blocks_for(most)) - slab.blocks
        more = max(least, min(wanted, self.capacity - self.used))
        if not self._make_room(more, 0):
            return False
        slab.blocks += more
        self.used += more
        return True

    def hold(self, slab: Slab, held: int) -> None:
        """The slab has the keys and values of this many tokens now."""
        slab.held = held
        if held // BLOCK > len(slab.indexed):
            for value in slab.chain.hashes(held)[len(slab.indexed) :]:
                self._index.setdefault(value, {})[slab.number] = slab
                slab.indexed.append(value)

    def close(self, slab: Slab, *, keep: bool) -> None:
        """The sequence is done with it. keep: as an entry of the prefix cache."""
        slab.busy = False
        slab.used = self._tick()
        if not keep or slab.held < BLOCK:
            self._drop(slab)

    def reset(self, capacity: int) -> None:
        """Everything goes, busy or not; `capacity` blocks from here on."""
        self.begin()
        for slab in list(self.slabs.values()):
            self._drop(slab)
        self.capacity = capacity

    def _find(self, chain: Chain) -> tuple[Slab | None, int]:
        deepest: dict[int, Slab] = {}
        for value in chain.hashes(len(chain) - 1):
            if (there := self._index.get(value)) is None:
                break
            deepest = there
        best, most = None, 0
        for slab in islice(reversed(deepest.values()), CANDIDATES):
            n = slab.chain.common(chain, min(slab.held, len(chain) - 1))
            if n > most or (n == most and best is not None and best.busy and not slab.busy):
                best, most = slab, n
        if best is None or most < BLOCK:  # two runs of tokens with one hash
            return None, 0
        best.used = self._tick()
        return best, most

    def _adopt(self, slab: Slab, chain: Chain, cached: int, need: int, spare: int) -> Opened | None:
        slab.busy = True
        more = max(0, need - slab.blocks)
        if slab.blocks > blocks_for(len(chain)):  # room for a block more: it is not moved before the first token
            more = 0
        if not self._make_room(more, spare):
            slab.busy = False
            return None
        slab.blocks += more
        self.used += more
        self._forget(slab, cached // BLOCK)
        slab.chain, slab.held = chain, cached
        return Opened(slab, cached, None)

    def _new(self, chain: Chain, held: int, blocks: int) -> Slab:
        self._next += 1
        slab = Slab(self._next, chain, 0, blocks)
        self.slabs[slab.number] = slab
        self.used += blocks
        self.hold(slab, held)
        return slab

    def _make_room(self, blocks: int, spare: int) -> bool:
        """Let idle slabs go until `blocks` are free; False, and none goes, where that and `spare` cannot be had."""
        short = self.used + blocks - self.capacity
        if short + spare <= 0:
            return True
        idle = [slab for slab in self.slabs.values() if not slab.busy and not slab.pins]
        if sum(slab.blocks for slab in idle) < short + spare:
            return False
        for slab in sorted(idle, key=lambda slab: slab.used):
            if self.used + blocks <= self.capacity:
                break
            self._drop(slab)
        return True

    def _drop(self, slab: Slab) -> None:
        self._forget(slab, 0)
        del self.slabs[slab.number]
        self.used -= slab.blocks
        self._drops.append(slab.number)

    def _forget(self, slab: Slab, blocks: int) -> None:
        """Leave only its first blocks in the index."""
        for value in slab.indexed[blocks:]:
            holders = self._index[value]
            del holders[slab.number]
            if not holders:
                del self._index[value]
        del slab.indexed[blocks:]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
