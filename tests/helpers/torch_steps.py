"""A runner that computes nothing, and holds a scheduler to what a Step promises.

It keeps the tokens of each slab as a real one keeps their keys and values. The next token is a function of all tokens
before it, so that an answer which went on from the wrong ones shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from helexa.neuron.harness.torch.blocks import BLOCK, blocks_for
from helexa.neuron.harness.torch.step import Step


def next_token(tokens: Sequence[int], vocabulary: int) -> int:
    return zlib.crc32(repr(list(tokens)).encode()) % vocabulary


class Slabs:
    """What the shards hold. kv_tokens: the budget, which no step may pass."""

    def __init__(self, kv_tokens: int) -> None:
        self.held: dict[int, list[int]] = {}
        self.most: dict[int, int] = {}  # tokens each slab ever held: its memory
        self.gone: set[int] = set()
        self.kv_tokens = kv_tokens

    def carry_out(self, step: Step) -> list[list[int]]:
        """For each answer that is wanted, the tokens up to it."""
        for number in step.drops:
            assert number not in self.gone
            self.held.pop(number, None)
            self.most.pop(number, None)
            self.gone.add(number)
        for copy in step.copies:
            assert copy.target not in self.held
            assert copy.target not in self.gone
            assert 0 < copy.tokens <= len(self.held[copy.source])
            self.held[copy.target] = self.held[copy.source][: copy.tokens]
            self._measure(copy.target)
        assert len({row.slab for row in step.rows}) == len(step.rows)
        wanted = []
        for row in step.rows:
            assert row.slab not in self.gone
            assert row.tokens
            assert 0 <= row.wanted <= len(row.tokens)
            held = self.held.setdefault(row.slab, [])
            assert row.start <= len(held)
            held[row.start :] = row.tokens
            self._measure(row.slab)
            wanted += [held[: len(held) - i] for i in reversed(range(row.wanted))]
        assert sum(blocks_for(n) for n in self.most.values()) * BLOCK <= self.kv_tokens
        return wanted

    def _measure(self, slab: int) -> None:
        self.most[slab] = max(self.most.get(slab, 0), len(self.held[slab]))
