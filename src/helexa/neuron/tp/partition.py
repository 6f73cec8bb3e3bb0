"""Which rank holds which part of a model. Pure, and computed once, by the leader; ranks are told, and never ask again.

Attention is dealt out in whole KV groups (a KV head and the query heads that read it) while there are as many groups as
ranks; else in query heads, and a KV head is then copied to every rank that has a query head of its group. MLP columns
and vocabulary rows are dealt out in units of 64, so that every rank's share suits the kernels. Shares follow the
weights by largest remainder, ties to the lower rank (Hamilton's method), and every rank gets a query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

UNIT: Final = 64  # columns of an MLP, rows of a vocabulary


class Impossible(ValueError):
    """This model cannot be split so. str() says why, and which world sizes can be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model is dealt out."""

    query_heads: int
    kv_heads: int
    mlp: int  # columns; 0 where every layer has experts instead
    vocabulary: int
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """start <= i < stop"""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of each."""

    query_heads: Span
    kv_heads: Span
    mlp: Span
    vocabulary: Span
    experts: Span


def partition(shape: Shape, world_size: int, weights: Sequence[float] | None = None) -> tuple[Share, ...]:
    """A Share for each rank. weights: by rank, in any unit; None is equal. Raises Impossible.

    1. More ranks than query heads: Impossible.
    2. At least as many KV groups as ranks: whole groups. Else query heads, each with the KV head of its group.
    3. MLP, vocabulary: units; the last one is short where 64 does not divide. Experts: whole ones.
    """
    heads, groups = shape.query_heads, shape.kv_heads
    if heads % groups:
        raise Impossible(f"{heads} query heads do not divide among {groups} KV heads")
    if world_size > heads:
        raise Impossible(f"{world_size} ranks need {world_size} query heads, the model has {heads}; use 1 to {heads}")
    given = list(weights) if weights is not None else [1.0] * world_size
    if len(given) != world_size or any(weight <= 0 for weight in given):
        raise Impossible(f"{world_size} ranks need {world_size} shares over 0, not {given}")
    per_group = heads // groups
    if groups >= world_size:
        dealt = _spans(deal(groups, given, least=1))
        queries = [Span(s.start * per_group, s.stop * per_group) for s in dealt]
        keys = dealt
    else:
        queries = _spans(deal(heads, given, least=1))
        keys = [Span(s.start // per_group, (s.stop - 1) // per_group + 1) for s in queries]
    return tuple(
        Share(*parts)
        for parts in zip(
            queries,
            keys,
            _units(shape.mlp, given),
            _units(shape.vocabulary, given),
            _spans(deal(shape.experts, given)),
            strict=True,
        )
    )


def possible_world_sizes(shape: Shape, most: int) -> list[int]:
    return list(range(1, min(most, shape.query_heads) + 1))


def thread_shares(threads: int, ranks: int) -> list[int]:
    """How many threads each rank gets on CPU, the lower ones the rest; at least one."""
    return [max(1, threads // ranks + (rank < threads % ranks)) for rank in range(ranks)]


def deal(count: int, weights: Sequence[float], *, least: int = 0) -> list[int]:
    """How many of `count` whole things each gets. count >= least * len(weights)."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    got = [max(least, int(share)) for share in exact]
    order = sorted(range(len(weights)), key=lambda rank: (got[rank] - exact[rank], rank))
    while sum(got) < count:
        for rank in order[: count - sum(got)]:
            got[rank] += 1
        order = sorted(range(len(weights)), key=lambda rank: (got[rank] - exact[rank], rank))
    while sum(got) > count:  # those with the least share were given `least`: from whom has the most over its own
        rank = max((r for r in range(len(weights)) if got[r] > least), key=lambda r: (got[r] - exact[r], r))
        got[rank] -= 1
    return got


def _units(size: int, weights: Sequence[float]) -> list[Span]:
    whole = _spans(deal(-(-size // UNIT), weights))
    return [Span(min(s.start * UNIT, size), min(s.stop * UNIT, size)) for s in whole]


def _spans(counts: Sequence[int]) -> list[Span]:
    out, at = [], 0
    for count in counts:
        out.append(Span(at, at + count))
        at += count
    return out
