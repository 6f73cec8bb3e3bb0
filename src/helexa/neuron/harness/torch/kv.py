"""Keys and values of every sequence, behind one interface: a slab a sequence, contiguous, grown as it fills.

On CPU torch has no attention over pages, and gathering pages copies the whole context each step, so a sequence's keys
and values lie in one block: [layers, 2 (keys, values), kv heads, capacity, head_dim].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from helexa.neuron.harness.torch.step import Copy

_STEP: Final = 256  # tokens; capacities are multiples of it
_GROWTH: Final = 1.5  # a copy of all it holds is paid for by the tokens that then fit


@dataclass(frozen=True, slots=True)
class Views:
    """A slab's parts by layer, as one step needs them."""

    write: Sequence[torch.Tensor]  # [2, kv heads, new tokens, head_dim]
    keys: dict[int, Sequence[torch.Tensor]]  # by the first token seen: [kv heads, tokens seen, head_dim]
    values: dict[int, Sequence[torch.Tensor]]


class Slabs:
    """Owned by the thread that runs the steps."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (layers, 2, kv_heads, head_dim)
        self._dtype, self.device = dtype, device
        self._slabs: dict[int, torch.Tensor] = {}
        self._held: dict[int, int] = {}

    @property
    def tokens(self) -> int:
        """For which there is room, whether or not it is used."""
        return sum(slab.shape[3] for slab in self._slabs.values())

    def drop(self, slab: int) -> None:
        self._slabs.pop(slab, None)
        self._held.pop(slab, None)

    def copy(self, copy: Copy) -> None:
        """Raises MemoryError, KeyError for a slab that is not there."""
        source = self._slabs[copy.source]
        self.reserve(copy.target, 0, copy.tokens, copy.room)
        self._slabs[copy.target][:, :, :, : copy.tokens] = source[:, :, :, : copy.tokens]

    def reserve(self, slab: int, start: int, end: int, room: int = 0) -> None:
        """Room for tokens up to `end`, of which the first `start` are kept. room: for how many there is to be room, as
        whoever counts the memory says; 0: the slab grows by a rule of its own. Raises MemoryError, and the slab is
        then as it was; ValueError if it does not hold `start` tokens."""
        held = self._held.get(slab, 0)
        if start > held:
            raise ValueError(f"slab {slab} holds {held} tokens, and a step starts at {start}")
        old = self._slabs.get(slab)
        if old is None or max(end, room) > old.shape[3]:
            wanted = end if old is None else max(end, int(old.shape[3] * _GROWTH))
            new = self._allocate(max(end, room) if room else -(-wanted // _STEP) * _STEP)
            if old is not None and start:
                new[:, :, :, :start] = old[:, :, :, :start]
            self._slabs[slab] = new
        self._held[slab] = end

    def clear(self) -> None:
        self._slabs.clear()
        self._held.clear()

    def _allocate(self, capacity: int) -> torch.Tensor:
        layers, two, heads, dim = self._shape
        return torch.empty(layers, two, heads, capacity, dim, dtype=self._dtype, device=self.device)

    def views(self, slab: int, start: int, end: int, firsts: Sequence[int]) -> Views:
        """firsts: which tokens the layers' attention begins at, each one once."""
        data = self._slabs[slab]
        keys, values = {}, {}
        for first in firsts:
            seen = data[:, :, :, first:end]
            keys[first], values[first] = seen[:, 0].unbind(0), seen[:, 1].unbind(0)
        return Views(data[:, :, :, start:end].unbind(0), keys, values)
