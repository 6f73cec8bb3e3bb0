"""How many requests a model and a node may have at once, where an operator has set a bound, and who waits for a place.

Without bounds a request goes on at once, and the node's slots and its queue decide; nothing here is asked. With them it
waits here, in a line for each model that is fair between clients. Whose turn it is tries when something has changed;
the others sleep. All calls come from the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from helexa.core.config import Bounds
from helexa.core.errors import Overloaded
from helexa.core.fair_queue import FairQueue, has_share, retry_after_s
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node, Replica


@dataclass(frozen=True, slots=True)
class Load:
    """running: requests that nodes have; waiting: of those, and of those here, what has no slot."""

    running: int
    waiting: int


def takes_one(bounds: Bounds, load: Load, *, queues: bool) -> bool:
    """May one more go to a node? queues: it would find no free slot there."""
    if bounds.running is not None and load.running >= bounds.running:
        return False
    return not queues or bounds.waiting is None or load.waiting < bounds.waiting


def load_of(replicas: Iterable[Replica], here: int = 0) -> Load:
    running = waiting = 0
    for replica in replicas:
        running += replica.inflight
        waiting += max(0, replica.inflight - replica.slots)
    return Load(running, waiting + here)


@dataclass(frozen=True, slots=True)
class Prospect:
    """A request that would not go on at once, and why. ahead: those that wait before it; refusal: no more may wait."""

    why: str
    ahead: int
    refusal: Overloaded | None


class Turn:
    """One request in a line. news: set when it is first in line and something may have changed."""

    __slots__ = ("client", "model_id", "news")

    def __init__(self, model_id: str, client: str) -> None:
        self.model_id = model_id
        self.client = client
        self.news = asyncio.Event()


class Admission:
    """queue: how many may wait for a model without a bound of its own. lines: by model, never an empty one."""

    def __init__(self, fleet: Fleet, queue: int, clock: Callable[[], float]) -> None:
        self.lines: dict[str, FairQueue[Turn]] = {}
        self._fleet = fleet
        self._queue = queue
        self._clock = clock
        fleet.on_change.append(self._view_changed)

    def full_nodes(self, model_id: str) -> list[str]:
        """Those that hold the model and take no more."""
        return [r.node.name for r in self._fleet.replicas(model_id) if not _node_takes(r.node, r)]

    def takes(self, model_id: str, replica: Replica | None = None) -> bool:
        """Does the model's own bound let one more go on, to this replica? None: wherever a slot is free."""
        bounds = self._bounds(model_id)
        queues = replica is not None and replica.beyond_slots >= 0
        return bounds is None or takes_one(bounds, self._load(model_id), queues=queues)

    def prospect(self, model_id: str) -> Prospect | None:
        """Of a request whose client has none here, for a model that is loaded; None: it goes on at once. Changes
        nothing."""
        replicas = self._fleet.replicas(model_id)
        here = len(self.lines.get(model_id, ()))
        full = self.full_nodes(model_id)
        free = [r for r in replicas if r.node.name not in full and self.takes(model_id, r)]
        if not here and free:
            return None
        load = self._load(model_id)
        if here:
            why = f"{here} request{'' if here == 1 else 's'} wait{'s' if here == 1 else ''} for a place before it"
        elif len(full) == len(replicas):
            why = f"{', '.join(full)} ha{'s' if len(full) == 1 else 've'} as many requests as `limits` allow there"
        else:
            why = f"{load.running} of its requests run and {load.waiting} wait for a slot: its `limits` allow no more"
        try:
            self._check_line(model_id, 0)
        except Overloaded as refusal:
            return Prospect(why, here, refusal)
        return Prospect(why, here, None)

    def enter(self, model_id: str, client: str, *, has_waited: bool = False) -> Turn:
        """At the end of the client's line. Raises Overloaded where no more may wait, unless it has waited already.
        Whoever has a turn gives it to `leave`."""
        line = self.lines.get(model_id)
        if not has_waited:
            self._check_line(model_id, line.own(client) if line is not None else 0)
        turn = Turn(model_id, client)
        self.lines.setdefault(model_id, FairQueue()).add(client, turn)
        return turn

    def is_first(self, turn: Turn) -> bool:
        return self.lines[turn.model_id].first() is turn

    def leave(self, turn: Turn, *, served: bool) -> None:
        """It goes on, or goes away; the next may try."""
        line = self.lines[turn.model_id]
        if served:
            line.pop()  # it was first: now another client is
        else:
            line.remove(turn.client, turn)
        if not line:
            del self.lines[turn.model_id]
        self.changed(turn.model_id)

    def changed(self, model_id: str | None = None) -> None:
        """There may be a place for this model, or (None) for any."""
        for line in list(self.lines.values()) if model_id is None else filter(None, [self.lines.get(model_id)]):
            turn = line.first()
            if turn is not None:
                turn.news.set()

    def overloaded(self, model_id: str, why: str) -> Overloaded:
        """With the time in which those who wait will have been served, at the pace of the model's replicas."""
        now = self._clock()
        paces = [pace for r in self._fleet.replicas(model_id) if (pace := r.pace(now)) is not None]
        again_s = retry_after_s(max(1, self._load(model_id).waiting), sum(paces))
        return Overloaded(f"{why}; try again in {again_s} s", retry_after_s=again_s)

    def _check_line(self, model_id: str, own: int) -> None:
        """May one more wait whose client has `own` there? Raises Overloaded."""
        bounds = self._bounds(model_id)
        room = self._queue if bounds is None or bounds.waiting is None else bounds.waiting
        waiting = self._load(model_id).waiting
        if waiting >= room:
            raise self.overloaded(model_id, f"{waiting} requests wait for {model_id} already, and {room} may")
        if not has_share(room, waiting, own):
            why = f"{own} of the {waiting} requests that wait for {model_id} are of this client"
            raise self.overloaded(model_id, f"{why}, and the last of {room} places are kept for others")

    def _view_changed(self, model_id: str | None) -> None:
        if self.lines:
            self.changed(model_id)

    def _bounds(self, model_id: str) -> Bounds | None:
        profile = self._fleet.profiles.get(model_id)
        return profile.limits if profile is not None else None

    def _load(self, model_id: str) -> Load:
        return load_of(self._fleet.replicas(model_id), len(self.lines.get(model_id, ())))


def _node_takes(node: Node, replica: Replica) -> bool:
    bounds = node.bounds
    return bounds is None or takes_one(bounds, load_of(node.replicas.values()), queues=replica.beyond_slots >= 0)
