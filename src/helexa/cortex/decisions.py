"""What the loader decided lately, as an operator asks for it: what, when, for whom, why, what else was weighed, and at
what price. Values and one bounded list; no clock of its own, no I/O.

Whoever decides notes it here: the loader what it loads and whom it refuses, the placer what goes for it, the keeper
what nobody asks for any more. Nothing is noted for a request that finds its model loaded. What repeats (a queue that
stays full, room that does not come) is counted in its first note, so that it does not push the others out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from helexa.cortex.listing import rfc3339
from helexa.cortex.plans import Plan, Reason
from helexa.cortex.swapper import Failure

What = Literal[
    "load",  # a load is ordered
    "load_failed",  # it did not come about
    "copy",  # a further replica is ordered, because requests queue
    "evict",  # a model goes, so that another has room
    "stays",  # it should have gone, and is in use
    "unload",  # the operator's word
    "expire",  # idle for its ttl_s
    "give_up",  # a further replica that nobody needs any more
    "wait",  # there is no room now; requests wait for it
    "timed_out",  # requests waited as long as they may
    "refuse",  # no node can, or too many wait already
    "defrag",
]
By = Literal["request", "operator", "preload", "upkeep"]

KEPT: Final = 200
NODES_SHOWN: Final = 32  # of those that were weighed; a plan for one fleet of 1,000 nodes must not take a megabyte
REQUESTS_SHOWN: Final = 8
REPEATS_WITHIN_S: Final = 60.0
_REPEATING: Final[Collection[What]] = frozenset({"wait", "timed_out", "refuse", "stays", "load_failed"})


class Weighed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node: its own plan, or (reason) why it has none."""

    node: str
    price: float | None = None
    victims: tuple[str, ...] = ()
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Whom:
    """For whom a decision was made. requests: their ids, as in the log; waiting: how many wait in all."""

    by: By
    requests: tuple[str, ...] = ()
    waiting: int = 0


UPKEEP: Final = Whom("upkeep")
OPERATOR: Final = Whom("operator")


class Decision(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of GET /fleet/decisions. model: what is acted on; wanted: the model that it makes room for."""

    seq: int
    at: str
    what: What
    model: str | None = None
    node: str | None = None
    wanted: str | None = None
    by: By
    requests: tuple[str, ...] = ()
    waiting: int = 0
    why: str
    price: float | None = None
    seconds: float | None = None
    weighed: list[Weighed] = []
    not_shown: int = 0  # nodes that were weighed beyond these
    times: int = 1
    last_at: str | None = None  # of the latest time, where it was more than one


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a plan was taken. nodes: how many could be asked in all."""

    why: str
    plan: Plan | None = None
    weighed: Sequence[Plan | Reason] = ()
    nodes: int = 0


class Decisions:
    """now: wall clock, seconds since 1970."""

    def __init__(self, now: Callable[[], float], kept: int = KEPT) -> None:
        self._now = now
        self._kept: deque[Decision] = deque(maxlen=kept)
        self._repeating: dict[tuple[What, str | None, str | None], tuple[Decision, float]] = {}
        self._seq = 0

    def note(
        self,
        what: What,
        why: str,
        whom: Whom,
        *,
        model: str | None = None,
        node: str | None = None,
        wanted: str | None = None,
        evidence: Evidence | None = None,
        against: Iterable[Failure | Reason] = (),
    ) -> None:
        """evidence: of the plan that is carried out; against: what stands against each node, where there is none."""
        now = self._now()
        if self._repeats(what, why, whom, (what, model, node), now):
            return
        self._seq += 1
        plan = evidence.plan if evidence is not None else None
        found = evidence.weighed if evidence is not None else tuple(against)
        nodes = evidence.nodes if evidence is not None else len(found)
        made = Decision(
            seq=self._seq,
            at=rfc3339(now),
            what=what,
            model=model,
            node=node,
            wanted=wanted,
            by=whom.by,
            requests=whom.requests[:REQUESTS_SHOWN],
            waiting=whom.waiting,
            why=why,
            price=plan.price if plan is not None else None,
            seconds=plan.seconds if plan is not None else None,
            weighed=[weighed(w) for w in found[:NODES_SHOWN]],
            not_shown=max(0, nodes - NODES_SHOWN),
        )
        self._kept.append(made)
        if what in _REPEATING:
            if len(self._repeating) > 2 * KEPT:
                self._repeating = {k: v for k, v in self._repeating.items() if now - v[1] < REPEATS_WITHIN_S}
            self._repeating[what, model, node] = (made, now)

    def last(self, count: int = KEPT) -> list[Decision]:
        """The latest first."""
        return list(reversed(self._kept))[:count]

    def _repeats(self, what: What, why: str, whom: Whom, key: tuple[What, str | None, str | None], now: float) -> bool:
        """It was noted a moment ago: counted there, in its latest words."""
        if what not in _REPEATING or (before := self._repeating.get(key)) is None:
            return False
        decision, at = before
        if now - at >= REPEATS_WITHIN_S or not self._kept or decision.seq < self._kept[0].seq:
            return False
        decision.times += 1
        decision.last_at, decision.why = rfc3339(now), why
        decision.waiting = whom.waiting
        known = dict.fromkeys((*decision.requests, *whom.requests))
        decision.requests = tuple(known)[-REQUESTS_SHOWN:]
        self._repeating[key] = (decision, now)
        return True


def weighed(found: Plan | Reason | Failure) -> Weighed:
    """One node as it is told."""
    if isinstance(found, Plan):
        return Weighed(node=found.node, price=found.price, victims=found.victims, seconds=found.seconds)
    return Weighed(node=found.node, reason=found.text if isinstance(found, Reason) else found.reason)
