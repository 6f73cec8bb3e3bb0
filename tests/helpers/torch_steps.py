"""A runner that computes nothing, and holds a scheduler to what a Step promises.

It keeps the tokens of each slab as a real one keeps their keys and values. The next token is a function of all tokens
before it, so that an answer which went on from the wrong ones shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from helexa.neuron.harness.torch.blocks import BLOCK, blocks_for
from helexa.neuron.harness.torch.step import Step


def next_token(tokens: Sequence[int], vocabulary: int) -> int:
    return zlib.crc32(repr(list(tokens)).encode()) % vocabulary


class Slabs:
    """What the shards hold. kv_tokens: the budget, which no step may pass."""

    def __init__(self, kv_tokens: int) -> None:
        self.held: dict[int, list[int]] = {}
        self.most: dict[int, int] = {}  # tokens each slab had to have room for: its memory
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
            assert copy.tokens <= copy.room
            self.most[copy.target] = copy.room
        assert len({row.slab for row in step.rows}) == len(step.rows)
        wanted = []
        for row in step.rows:
            assert row.slab not in self.gone
            assert row.tokens
            assert 0 <= row.wanted <= len(row.tokens)
            held = self.held.setdefault(row.slab, [])
            assert row.start <= len(held)
            held[row.start :] = row.tokens
            assert len(held) <= row.room
            self.most[row.slab] = max(self.most.get(row.slab, 0), row.room)
            wanted += [held[: len(held) - i] for i in reversed(range(row.wanted))]
        assert sum(blocks_for(n) for n in self.most.values()) * BLOCK <= self.kv_tokens
        return wanted


class Rows:
    """What a runner answers with, as far as the engine knows a tensor."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def numpy(self, *, force: bool) -> Any:
        return self._rows


class FakeRunner:
    """Logits 8 for the next token and 0 for all others; hidden states (1, last token, tokens before).

    before: called with each step before it is carried out; it may wait, or raise
    """

    def __init__(self, vocabulary: int, kv_tokens: int) -> None:
        self.vocabulary = vocabulary
        self.slabs = Slabs(kv_tokens)
        self.steps: list[Step] = []
        self.closed = 0
        self.before: Callable[[Step], None] = lambda step: None
        self.logits: Callable[[list[int]], Any] = self.one_hot

    def step(self, step: Step) -> Any:
        self.before(step)
        self.steps.append(step)
        wanted = self.slabs.carry_out(step)
        if step.hidden:
            return Rows(np.array([[1.0, t[-1], len(t) - 1] for t in wanted], np.float32))
        return Rows(np.array([self.logits(tokens) for tokens in wanted], np.float32))

    def close(self) -> None:
        self.closed += 1

    def one_hot(self, tokens: list[int]) -> Any:
        row = np.zeros(self.vocabulary + 4, np.float32)  # padded, as many models are
        row[next_token(tokens, self.vocabulary)] = 8.0
        return row
