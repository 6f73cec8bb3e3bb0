"""What engines keep of prompts, as the simulator has it: a pool of tokens, or the last prompt of each slot.

A prompt is the ids of its prefixes, the shortest first, and the tokens up to the end of each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class EngineCache(Protocol):
    def held(self, ids: Sequence[int], ends: Sequence[int]) -> int:
        """Tokens of the prompt that need not be computed."""

    def keep(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        """They were computed."""


class Pool:
    """One pool over all requests, by prefix (vLLM, SGLang, our torch engine); what was used longest ago goes first."""

    def __init__(self, tokens: int) -> None:
        self._room = tokens
        self._shares: OrderedDict[int, int] = OrderedDict()

    def held(self, ids: Sequence[int], ends: Sequence[int]) -> int:
        found = 0
        for key, end in zip(ids, ends, strict=True):
            if key not in self._shares:
                break
            found = end
        return found

    def keep(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        shares = self._shares
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] in shares:
                shares.move_to_end(ids[at])
            else:
                share = ends[at] - (ends[at - 1] if at else 0)
                shares[ids[at]] = share
                self._room -= share
        while self._room < 0:
            _, share = shares.popitem(last=False)
            self._room += share


class Slots:
    """The last prompt of each slot (llama.cpp): a request takes the slot that shares most with it, else the oldest."""

    def __init__(self, count: int) -> None:
        self._slots: list[Sequence[int]] = [()] * count  # the oldest first

    def held(self, ids: Sequence[int], ends: Sequence[int]) -> int:
        _, shared = self._best(ids)
        return ends[shared - 1] if shared else 0

    def keep(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        at, _ = self._best(ids)
        del self._slots[at]
        self._slots.append(ids)

    def _best(self, ids: Sequence[int]) -> tuple[int, int]:
        best, most = 0, 0
        for at, slot in enumerate(self._slots):
            shared = 0
            for mine, its in zip(ids, slot, strict=False):
                if mine != its:
                    break
                shared += 1
            if shared > most:
                best, most = at, shared
        return best, most
