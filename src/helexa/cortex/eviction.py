"""Which loaded models make room for another. Pure: what a node holds in, victims in their order out. No clock, no I/O.

A model's score says how dear it is to lose; the lowest goes first, and the sum over a plan's victims is its price, by
which placement compares nodes. What is pinned, in use, younger than its minimum residency or not settled never goes.

Measured (docs/explanation/placement.md): score = (uses x size / idle seconds) ** 1/4, uses a count that halves every
four hours. The root says how nodes compare, where victims are summed: the square root's loads are some hundredths more.
Without the size the loads are some hundredths fewer, and take longer, so that more is waited: what is large is slow to
come back. Weighting with more than the size makes more loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp2, sqrt
from typing import Final

import msgspec
from msgspec.structs import force_setattr

from helexa.core.lifecycle import ModelStatus

HALF_LIFE_S: Final = 4 * 3600.0  # of the count of uses; 1 h to 24 h give the same
MOST_RESIDENCY_S: Final = 15.0  # a flat minute makes waiting 1.6 times as long where many models share a node
BASE_MB: Final = 2048  # a load's fixed part, as size: two seconds at 1 GB/s
_LEAST_IDLE_S: Final = 1e-3  # two models idle since the same moment still differ by their uses


class Resident(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A model on a node, as a decision sees it. Times are of the caller's clock, in seconds.

    A msgspec Struct and no dataclass, because a view of 1,000 nodes makes thousands of them (0.3 us against 3 us each).

    memory_mb:       by device; mb: in all, which follows from it
    in_use:          requests that run there; queued: that wait at the node
    uses, uses_at:   the model's decayed count of requests, as of uses_at (`Usage`)
    last_used:       the begin or the end of a request, whichever was last; loaded_at where there was none
    min_residency_s: `min_residency_s(seconds its load took)`
    copies:          nodes that hold it loaded, this one counted
    """

    model: str
    memory_mb: Mapping[int, int]
    state: ModelStatus = ModelStatus.LOADED
    in_use: int = 0
    queued: int = 0
    pinned: bool = False
    last_used: float = 0.0
    uses: float = 0.0
    uses_at: float = 0.0
    loaded_at: float = 0.0
    min_residency_s: float = 0.0
    priority: int = 0
    copies: int = 1
    ttl_s: float | None = None
    mb: int = 0

    def __post_init__(self) -> None:
        force_setattr(self, "mb", sum(self.memory_mb.values()))  # asked for far more often than it is made

    @property
    def is_busy(self) -> bool:
        return self.in_use > 0 or self.queued > 0

    @property
    def may_go_at(self) -> float:
        """The end of its minimum residency."""
        return self.loaded_at + self.min_residency_s


@dataclass(frozen=True, slots=True)
class Usage:
    """How much a model was asked for lately: a count of requests that halves every HALF_LIFE_S."""

    count: float = 0.0
    at: float = 0.0

    def at_time(self, now: float) -> float:
        return decayed(self.count, now - self.at)

    def used(self, now: float) -> Usage:
        return Usage(self.at_time(now) + 1.0, now)


def decayed(count: float, seconds: float) -> float:
    return count * exp2(-seconds / HALF_LIFE_S) if count else 0.0


def min_residency_s(load_s: float | None) -> float:
    """How long a model stays at least: without it two models that take turns would be loaded for every request."""
    return MOST_RESIDENCY_S if load_s is None else min(load_s / 2, MOST_RESIDENCY_S)


# Scores


Score = Callable[[Resident, float], float]


def lru(resident: Resident, now: float) -> float:
    return 1.0 / max(now - resident.last_used, _LEAST_IDLE_S)


def adaptive(resident: Resident, now: float) -> float:
    # HOT: once for each resident of a full fleet. `decayed` is written out here.
    idle_s = now - resident.last_used
    uses = resident.uses * exp2((resident.uses_at - now) / HALF_LIFE_S)
    worth = uses * (resident.mb + BASE_MB)
    return sqrt(sqrt(worth / (idle_s if idle_s > _LEAST_IDLE_S else _LEAST_IDLE_S)))


@dataclass(frozen=True, slots=True)
class Policy:
    """by_class: `residency_priority` makes classes. A model displaces its own class and those below, never one above;
    the lowest class goes first, and within a class the score decides."""

    name: str
    score: Score
    by_class: bool = False

    def price(self, resident: Resident, now: float) -> Price:
        """A surplus copy costs nothing: whoever asks for the model finds the other one."""
        rank = resident.priority if self.by_class else 0
        return (rank, 0.0 if resident.copies > 1 else self.score(resident, now))


# The highest class among the victims, and the sum of their scores. Grows with each victim.
Price = tuple[int, float]

FREE: Final[Price] = (-(2**31), 0.0)  # of a plan without victims

POLICIES: Final[dict[str, Policy]] = {
    "lru": Policy("lru", lru),
    "priority": Policy("priority", adaptive, by_class=True),
    "adaptive": Policy("adaptive", adaptive),
}


def total(prices: Iterable[Price]) -> Price:
    rank, sum_of_scores = FREE
    for its_rank, score in prices:
        rank, sum_of_scores = max(rank, its_rank), sum_of_scores + score
    return (rank, sum_of_scores)


# Who may go


class Kept(Enum):
    """Why a resident is no victim."""

    PINNED = "is pinned"
    UNSETTLED = "is on its way in or out"
    IN_USE = "is in use"
    YOUNG = "has just been loaded"
    ABOVE = "has a higher residency_priority"


def why_kept(resident: Resident, policy: Policy, priority: int, now: float, *, drain: bool = False) -> Kept | None:
    """None: it may go, for a model of this priority. drain: what is in use may go too, once it has finished."""
    if resident.pinned:
        return Kept.PINNED
    if resident.state is not ModelStatus.LOADED:
        return Kept.UNSETTLED
    if policy.by_class and resident.priority > priority:
        return Kept.ABOVE
    if not drain and (resident.in_use > 0 or resident.queued > 0):
        return Kept.IN_USE
    if now < resident.loaded_at + resident.min_residency_s:
        return Kept.YOUNG
    return None


@dataclass(frozen=True, slots=True)
class Victim:
    resident: Resident
    price: Price


def candidates(
    residents: Iterable[Resident], policy: Policy, priority: int, now: float, *, drain: bool = False
) -> list[Victim]:
    """Those that may go, the cheapest first; of equals the larger, since fewer have to go then."""
    found = [
        Victim(r, policy.price(r, now)) for r in residents if why_kept(r, policy, priority, now, drain=drain) is None
    ]
    if len(found) > 1:
        found.sort(key=lambda v: (v.price, -v.resident.mb, v.resident.model))
    return found


def victims(ordered: Sequence[Victim], fits: Callable[[Mapping[int, int]], bool]) -> list[Victim] | None:
    """What has to go until it fits: in the order given, then given back, dearest first, what turns out not to be
    needed. None where it does not fit even without them all.

    fits: does it, with so many MB more by device? More never makes it fit less.
    """
    freed: dict[int, int] = {}
    if fits(freed):
        return []
    chosen: list[Victim] = []
    for victim in ordered:
        chosen.append(victim)
        for device, mb in victim.resident.memory_mb.items():
            freed[device] = freed.get(device, 0) + mb
        if fits(freed):
            break
    else:
        return None
    for victim in chosen[-2::-1]:  # the last one is needed: without it, it did not fit
        without = dict(freed)
        for device, mb in victim.resident.memory_mb.items():
            without[device] -= mb
        if fits(without):
            freed = without
            chosen.remove(victim)
    return chosen


def expired(residents: Iterable[Resident], now: float) -> list[Resident]:
    """Idle for its `ttl_s` or longer, and to be unloaded though nobody needs the room; never what is pinned or busy."""
    return [
        r
        for r in residents
        if r.ttl_s is not None
        and r.state is ModelStatus.LOADED
        and not r.pinned
        and not r.is_busy
        and now - r.last_used >= r.ttl_s
        and now >= r.may_go_at
    ]
