"""The policy of loading, as a state machine: who waits for what, which node is tried next, when to give up.

Pure: `step(state, event, now) -> (state, commands)`. No clock, no I/O, no asyncio; the loader carries out, and a
simulator can. One pursuit per wanted model, however many requests ask for it:

    Asked ──> PLACING ──Placed──────────────> LOADING ──Ended: loaded──> (served, over)
                 ^  \\ \\                        │
                 │   │ Placed, with victims ─> CLEARING: one victim goes, then placed anew from fresh facts
                 │   NoPlace                   │  │
                 │     │               Ended, Cleared: failed; remembered, and the next node is looked for
                 │     ├─> (every waiter refused with each node's reason, over)
                 │     └─> RESTING     │          room may come: placed again then, or when `Room` says so
                 └─────────┴───────────┘

`Place` asks where; it is answered by `Placed` or `NoPlace`, from the fleet as it is. Victims go one at a time and each
is followed by a new placement: what is free is known only then, and another may need no further victim. A node that
refuses (a victim is in use again, another gateway took the room) makes a new plan too, at once a few times, then later
and later. Whoever waits is answered by its deadline at the latest, in every phase; a load or an unload goes on though
nobody waits for it any more. Those who have waited longest are placed first, and after DRAIN_AFTER_S a model in use
may have to finish and go: so models that take turns in one memory are served in batches, and none waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from helexa.core.fair_queue import has_share

Waiter = int | str


class Kind(Enum):
    """Why a load did not come about on a node, and with it, what that means for the next request."""

    NO_ROOM = "no room"  # its memory is taken: another node, or later
    PINNED = "pinned"  # it would have room if a pinned model went, which none does
    NEVER = "never"  # it can never hold it, or the file or the profile is wrong
    FAILED = "failed"  # it was tried and went wrong
    OUT_OF_MEMORY = "out of memory"  # it was tried, and took more than was there
    GONE = "gone"  # the node died, or did not answer
    BUSY = "busy"  # it will be able to soon (an unload is under way): worth waiting for
    DIFFERENT = "different"  # loaded there with another profile; only an operator is told


# Seconds that a node is left alone after a failure of each kind: the first time, and at most (each time doubles it).
# Room may come with any unload, a file may be mended, and asking costs milliseconds; a failed load cost minutes.
REST_S: Final[dict[Kind, tuple[float, float]]] = {
    Kind.NO_ROOM: (1, 1),
    Kind.PINNED: (1, 1),
    Kind.NEVER: (10, 60),
    Kind.FAILED: (10, 300),
    Kind.OUT_OF_MEMORY: (10, 300),
    Kind.GONE: (2, 30),
    Kind.BUSY: (0.5, 2),
    Kind.DIFFERENT: (1, 1),
}

DRAIN_AFTER_S: Final = 15.0  # 10 to 30 s are equally good, at once costs 4 % more loads
CONFLICTS: Final = 2  # refusals in a row (in use again, room taken) from which on a node that refuses is left out
CONFLICT_REST_S: Final = (0.25, 4.0)  # where that leaves none: the first rest, and the longest; each doubles it


@dataclass(frozen=True, slots=True)
class Failure:
    node: str
    kind: Kind
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)  # need_mb, free_mb where the node told them


@dataclass(frozen=True, slots=True)
class Remembered:
    """A failure of one model on one node. (Keyed by model alone, one node's fault would hold back the others.)"""

    failure: Failure
    until: float
    times: int


# Events


@dataclass(frozen=True, slots=True)
class Asked:
    """A request waits for the model, until `deadline`. client: whose share of the queue it takes; None: nobody's, as
    for what the gateway itself wants. room: how many may wait for this model, where that is not `State.queue`."""

    model: str
    waiter: Waiter
    deadline: float
    client: str | None = None
    room: int | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """It went away, or has been answered otherwise."""

    model: str
    waiter: Waiter


@dataclass(frozen=True, slots=True)
class Placed:
    """victims: what has to be unloaded there first; drains: those of them that are in use and have to finish."""

    model: str
    node: str
    victims: tuple[str, ...] = ()
    drains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No node is left to try. again_at: when one may be (what holds its room is in use, or has just been loaded).
    reasons: what stands against each node."""

    model: str
    again_at: float | None = None
    reasons: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Cleared:
    """A victim is gone, or (failure) it is not: BUSY, where requests came or run on."""

    model: str
    node: str
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Room:
    """There may be room where there was none: a model has become idle or has gone, a node has come."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A load is over; failure None: it is loaded."""

    model: str
    node: str
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model can be asked somewhere, whoever loaded it."""

    model: str


@dataclass(frozen=True, slots=True)
class Forgive:
    """The operator wants it tried again: what failed is forgotten."""

    model: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; due at `next_wake`."""


Event = Asked | Left | Placed | NoPlace | Cleared | Ended | Ready | Room | Forgive | Tick


# Commands


@dataclass(frozen=True, slots=True)
class Place:
    """Find a node for it, none of `avoid`. drain: models in use may be victims, and finish first."""

    model: str
    avoid: frozenset[str]
    drain: bool = False


@dataclass(frozen=True, slots=True)
class Clear:
    """Unload the victim there, once it has finished if `drain`; report `Cleared`."""

    model: str
    node: str
    victim: str
    drain: bool


@dataclass(frozen=True, slots=True)
class Load:
    """Load it there, or follow the load that is under way there; report `Ended`."""

    model: str
    node: str


@dataclass(frozen=True, slots=True)
class Serve:
    model: str
    waiters: tuple[Waiter, ...]


class Why(Enum):
    QUEUE_FULL = "queue full"
    SHARE_FULL = "share full"  # its client has as many in the queue as it may have
    TIMED_OUT = "timed out"
    NO_PLACE = "no place"


@dataclass(frozen=True, slots=True)
class Refuse:
    """failures: of each node that was tried, is left alone for what it did lately, or has no room."""

    model: str
    waiters: tuple[Waiter, ...]
    why: Why
    failures: tuple[Failure, ...] = ()


Command = Place | Clear | Load | Serve | Refuse


# State


class Phase(Enum):
    PLACING = "placing"
    CLEARING = "clearing"
    LOADING = "loading"
    RESTING = "resting"


@dataclass(frozen=True, slots=True)
class Pursuit:
    """One wanted model.

    waiters:   with deadlines, in order of arrival
    clients:   of the waiters that take a share of the queue
    since:     when it was first asked for
    node:      while CLEARING or LOADING
    wake_at:   while RESTING
    tried:     the nodes where it failed
    blocked:   what stood against each node when it was last looked for one
    conflicts: refusals in a row; contested: the nodes that refused lately, left out until the next rest is over
    starved:   a load ran out of memory, and was planned once more with a greater need
    """

    phase: Phase
    waiters: tuple[tuple[Waiter, float], ...] = ()
    clients: Mapping[Waiter, str] = field(default_factory=dict)
    since: float = 0.0
    node: str | None = None
    wake_at: float | None = None
    tried: tuple[Failure, ...] = ()
    blocked: tuple[Failure, ...] = ()
    conflicts: int = 0
    contested: frozenset[str] = frozenset()
    starved: bool = False

    def names(self) -> tuple[Waiter, ...]:
        return tuple(waiter for waiter, _ in self.waiters)


@dataclass(frozen=True, slots=True)
class State:
    """queue: how many may wait for one model. drain_after_s: how long it waits for models in use to become idle."""

    queue: int
    drain_after_s: float = DRAIN_AFTER_S
    wanted: Mapping[str, Pursuit] = field(default_factory=dict)
    remembered: Mapping[str, Mapping[str, Remembered]] = field(default_factory=dict)  # model -> node -> what failed

    def resting(self, model: str, now: float) -> list[Remembered]:
        """What keeps nodes from being tried for this model now."""
        return [r for r in self.remembered.get(model, {}).values() if r.until > now]


Step = tuple[State, list[Command]]


def step(state: State, event: Event, now: float) -> Step:
    """What follows from an event. An event that fits nothing (late, twice) changes nothing."""
    match event:
        case Asked():
            return _asked(state, event, now)
        case Tick():
            return _tick(state, now)
        case Room():
            return _place_all(state, [m for m, p in state.wanted.items() if p.phase is Phase.RESTING], now)
        case Ended():
            return _ended(state, event, now)
        case Forgive(model):
            return replace(state, remembered={m: r for m, r in state.remembered.items() if m != model}), []
    pursuit = state.wanted.get(event.model)
    if pursuit is None:
        return state, []
    match event:
        case Left(model, waiter):
            return _left(state, model, pursuit, frozenset({waiter})), []
        case Ready(model):
            served: list[Command] = [Serve(model, pursuit.names())] if pursuit.waiters else []
            return _left(state, model, pursuit, frozenset(pursuit.names())), served
        case Placed() if pursuit.phase is Phase.PLACING:
            return _placed(state, event, pursuit)
        case NoPlace() if pursuit.phase is Phase.PLACING:
            return _no_place(state, event, pursuit, now)
        case Cleared() if pursuit.phase is Phase.CLEARING and pursuit.node == event.node:
            return _cleared(state, event, pursuit, now)
    return state, []


def next_wake(state: State) -> float | None:
    """When a Tick is due: the first deadline or end of a rest; None while nothing waits for time."""
    times = [deadline for pursuit in state.wanted.values() for _, deadline in pursuit.waiters]
    times += [pursuit.wake_at for pursuit in state.wanted.values() if pursuit.wake_at is not None]
    return min(times, default=None)


def _asked(state: State, event: Asked, now: float) -> Step:
    """1. The queue is full, or its client's share of it: refused. 2. Wanted already: waits with the others. 3. A new
    pursuit."""
    pursuit = state.wanted.get(event.model)
    client = {event.waiter: event.client} if event.client is not None else {}
    if pursuit is not None:
        room, waiting = state.queue if event.room is None else event.room, len(pursuit.waiters)
        own = sum(1 for name in pursuit.clients.values() if name == event.client)
        if waiting >= room:
            return state, [Refuse(event.model, (event.waiter,), Why.QUEUE_FULL)]
        if event.client is not None and not has_share(room, waiting, own):
            return state, [Refuse(event.model, (event.waiter,), Why.SHARE_FULL)]
        waiters = (*pursuit.waiters, (event.waiter, event.deadline))
        return _with(state, event.model, replace(pursuit, waiters=waiters, clients={**pursuit.clients, **client})), []
    new = Pursuit(Phase.PLACING, waiters=((event.waiter, event.deadline),), clients=client, since=now)
    return _place(state, event.model, new, now)


def _place(state: State, model: str, pursuit: Pursuit, now: float) -> Step:
    avoid = {f.node for f in pursuit.tried} | {r.failure.node for r in state.resting(model, now)} | pursuit.contested
    placing = replace(pursuit, phase=Phase.PLACING, node=None, wake_at=None)
    drain = now - pursuit.since >= state.drain_after_s
    return _with(state, model, placing), [Place(model, frozenset(avoid), drain)]


def _place_all(state: State, models: Iterable[str], now: float) -> Step:
    """Who has waited longest comes first: what one takes, the next no longer finds."""
    commands: list[Command] = []
    for model in sorted(models, key=lambda m: state.wanted[m].since):
        state, more = _place(state, model, state.wanted[model], now)
        commands += more
    return state, commands


def _placed(state: State, event: Placed, pursuit: Pursuit) -> Step:
    """1. Something has to go first: the first victim. 2. There is room: load."""
    model, node = event.model, event.node
    if event.victims:
        victim = event.victims[0]
        clearing = replace(pursuit, phase=Phase.CLEARING, node=node)
        return _with(state, model, clearing), [Clear(model, node, victim, victim in event.drains)]
    return _with(state, model, replace(pursuit, phase=Phase.LOADING, node=node)), [Load(model, node)]


def _no_place(state: State, event: NoPlace, pursuit: Pursuit, now: float) -> Step:
    """1. Room may come, or a node is only busy: rest until it may be asked. 2. Everybody is told each node's reason."""
    model, resting = event.model, state.resting(event.model, now)
    times = [r.until for r in resting if r.failure.kind is Kind.BUSY]
    if event.again_at is not None:
        times.append(event.again_at)
    if pursuit.contested:
        first, most = CONFLICT_REST_S
        times.append(now + min(first * 2.0 ** min(pursuit.conflicts - CONFLICTS, 30), most))
    if times:
        blocked = event.reasons or pursuit.blocked
        rests = replace(pursuit, phase=Phase.RESTING, wake_at=min(times), blocked=blocked, contested=frozenset[str]())
        return _with(state, model, rests), []
    told = {f.node: f for f in [*event.reasons, *(r.failure for r in resting), *pursuit.tried]}
    return _with(state, model, None), [Refuse(model, pursuit.names(), Why.NO_PLACE, tuple(told.values()))]


def _cleared(state: State, event: Cleared, pursuit: Pursuit, now: float) -> Step:
    """1. Nobody waits any more: what else had to go stays. 2. Gone, or in use again: a new plan. 3. The node failed."""
    if event.failure is not None and event.failure.kind is not Kind.BUSY:
        state = _remember(state, event, now)
    if not pursuit.waiters:
        return _with(state, event.model, None), []
    return _again(state, event.model, pursuit, event.failure, now)


def _ended(state: State, event: Ended, now: float) -> Step:
    """1. Out of memory for the first time: once more, since the need is known to be greater now. 2. What happened is
    remembered, whoever began the load. 3. Loaded: everybody is served. 4. Failed: a new plan, or the next node, unless
    nobody waits any more."""
    model, failure = event.model, event.failure
    pursuit = state.wanted.get(model)
    is_starved = failure is not None and failure.kind is Kind.OUT_OF_MEMORY
    if is_starved and pursuit is not None and pursuit.node == event.node and pursuit.waiters and not pursuit.starved:
        return _place(state, model, replace(pursuit, starved=True), now)
    state = _remember(state, event, now)
    if pursuit is None or pursuit.phase is not Phase.LOADING or pursuit.node != event.node:
        return state, []
    if failure is None:
        served: list[Command] = [Serve(model, pursuit.names())] if pursuit.waiters else []
        return _with(state, model, None), served
    if not pursuit.waiters:
        return _with(state, model, None), []
    return _again(state, model, pursuit, failure, now)


def _again(state: State, model: str, pursuit: Pursuit, failure: Failure | None, now: float) -> Step:
    """1. The step succeeded: on. 2. The facts were not as the plan had them: a new one; after some without this node,
    and later and later. 3. The node has failed it: the next one."""
    if failure is None:
        return _place(state, model, replace(pursuit, conflicts=0, contested=frozenset[str]()), now)
    if failure.kind is Kind.NO_ROOM or (failure.kind is Kind.BUSY and pursuit.phase is Phase.CLEARING):
        conflicts = pursuit.conflicts + 1
        contested = pursuit.contested | {failure.node} if conflicts >= CONFLICTS else pursuit.contested
        pursuit = replace(pursuit, conflicts=conflicts, contested=contested, blocked=(failure,))
        return _place(state, model, pursuit, now)
    if failure.kind is not Kind.BUSY:
        pursuit = replace(pursuit, tried=(*pursuit.tried, failure))
    return _place(state, model, pursuit, now)


def _tick(state: State, now: float) -> Step:
    """1. Who waited long enough is refused. 2. Rests that are over: placed anew. 3. Old failures are forgotten."""
    commands: list[Command] = []
    for model, pursuit in list(state.wanted.items()):
        late = tuple(waiter for waiter, deadline in pursuit.waiters if deadline <= now)
        if late:
            blocked = pursuit.blocked if pursuit.phase is Phase.RESTING else ()
            commands.append(Refuse(model, late, Why.TIMED_OUT, (*blocked, *pursuit.tried)))
            state = _left(state, model, pursuit, frozenset(late))
    woken = [m for m, p in state.wanted.items() if p.wake_at is not None and p.wake_at <= now]
    state, placed = _place_all(state, woken, now)
    commands += placed
    kept = {m: {n: r for n, r in nodes.items() if now < _forgotten_at(r)} for m, nodes in state.remembered.items()}
    return replace(state, remembered={m: nodes for m, nodes in kept.items() if nodes}), commands


def _left(state: State, model: str, pursuit: Pursuit, gone: Iterable[Waiter]) -> State:
    """Without these waiters; without the pursuit where nobody waits and nothing is under way."""
    waiters = tuple(w for w in pursuit.waiters if w[0] not in gone)
    over = not waiters and pursuit.phase not in (Phase.CLEARING, Phase.LOADING)
    clients = {waiter: client for waiter, client in pursuit.clients.items() if waiter not in gone}
    return _with(state, model, None if over else replace(pursuit, waiters=waiters, clients=clients))


def _with(state: State, model: str, pursuit: Pursuit | None) -> State:
    wanted = {m: p for m, p in state.wanted.items() if m != model}
    if pursuit is not None:
        wanted[model] = pursuit
    return replace(state, wanted=wanted)


def _remember(state: State, event: Ended | Cleared, now: float) -> State:
    """NO_ROOM is not: the next plan is made from the facts."""
    nodes = dict(state.remembered.get(event.model, {}))
    before = nodes.pop(event.node, None)
    if event.failure is not None and event.failure.kind is not Kind.NO_ROOM:
        first, most = REST_S[event.failure.kind]
        again = before is not None and before.failure.kind is event.failure.kind
        times = before.times + 1 if before is not None and again else 1
        rest = min(first * 2.0 ** min(times - 1, 30), most)
        nodes[event.node] = Remembered(event.failure, now + rest, times)
    remembered = {m: r for m, r in state.remembered.items() if m != event.model}
    if nodes:
        remembered[event.model] = nodes
    return replace(state, remembered=remembered)


def _forgotten_at(remembered: Remembered) -> float:
    """When a further failure counts as a first one again: after the longest rest of its kind."""
    return remembered.until + REST_S[remembered.failure.kind][1]
