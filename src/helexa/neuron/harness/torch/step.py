"""What one step of the engine computes. Wire types, the same for every rank; imports no torch.

The scheduler makes a Step, each rank's shard carries it out, and rank 0 alone gets an answer. A step is deltas: what
the shards hold already (the keys and values of earlier tokens) is named by its slab and never sent again.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class Copy(msgspec.Struct, array_like=True):
    """The first `tokens` of one slab into another, which holds nothing yet: a prefix that two sequences share.
    room: as a row's."""

    source: int
    target: int
    tokens: int
    room: int = 0


class Row(msgspec.Struct, array_like=True):
    """The next tokens of one sequence.

    slab:   the number under which its keys and values are kept; a number that is new is a new, empty slab
    start:  tokens in the slab already; what it held beyond them is forgotten
    tokens: ids to compute, at positions start, start + 1, ...
    wanted: of how many of the last of them an answer is wanted; 0 in a chunk of a prefill that goes on
    room:   tokens for which the slab is to have memory; it never shrinks, and what is asked for is what it may take
    """

    slab: int
    start: int
    tokens: list[int]
    wanted: int = 1
    room: int = 0


class Step(msgspec.Struct, array_like=True):
    """Carried out in this order: drops, copies, rows.

    hidden: the answer is the last hidden states, after the final norm, in place of logits (for embeddings)
    """

    rows: list[Row]
    drops: list[int] = []
    copies: list[Copy] = []
    hidden: bool = False


class StepFailed(Exception):
    """The model can go no further: a device or a rank failed. str() is the reason. Never for a single request."""


class Runner(Protocol):
    """Where steps are computed: in this process, or in it and others. One caller, one thread."""

    def step(self, step: Step) -> Any:
        """A tensor [sum of row.wanted, vocabulary or hidden size], float32, rows in their order. Blocks.
        Raises StepFailed, MemoryError."""

    def close(self) -> None: ...
