"""The policy of loading, as a state machine: who waits for what, which node is tried next, when to give up.

Pure: `step(state, event, now) -> (state, commands)`. No clock, no I/O, no asyncio; the loader carries out, and a
simulator can. One pursuit per wanted model, however many requests ask for it:

    Asked ──> PLACING ──Placed──> LOADING ──Ended: loaded──> (served, over)
                 ^  \\                 │
                 │   NoPlace          Ended: failed, remembered, and the next node is looked for
                 │     │               │
                 │     ├─> (every waiter refused with each node's reason, over)
                 │     └─> RESTING     │        a node is only busy: asked again when its rest is over
                 └─────────┴───────────┘

`Place` asks where; it is answered at once by `Placed` or `NoPlace`, from the fleet as it is. What a placement may need
first (an unload) is a command and a phase of its own, before `Load`. Whoever waits is answered by its deadline at the
latest, in every phase; a load goes on though nobody waits for it any more, since it is nearly always wanted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

Waiter = int | str


class Kind(Enum):
    """Why a load did not come about on a node, and with it, what that means for the next request."""

    NO_ROOM = "no room"  # its memory is taken: another node, or later
    NEVER = "never"  # it can never hold it, or the file or the profile is wrong
    FAILED = "failed"  # it was tried and went wrong
    GONE = "gone"  # the node died, or did not answer
    BUSY = "busy"  # it will be able to soon (an unload is under way): worth waiting for
    DIFFERENT = "different"  # loaded there with another profile; only an operator is told


# Seconds that a node is left alone after a failure of each kind: the first time, and at most (each time doubles it).
# Room may come with any unload, a file may be mended, and asking costs milliseconds; a failed load cost minutes.
REST_S: Final[dict[Kind, tuple[float, float]]] = {
    Kind.NO_ROOM: (1, 1),
    Kind.NEVER: (10, 60),
    Kind.FAILED: (10, 300),
    Kind.GONE: (2, 30),
    Kind.BUSY: (0.5, 2),
    Kind.DIFFERENT: (1, 1),
}


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
    """A request waits for the model, until `deadline`."""

    model: str
    waiter: Waiter
    deadline: float


@dataclass(frozen=True, slots=True)
class Left:
    """It went away, or has been answered otherwise."""

    model: str
    waiter: Waiter


@dataclass(frozen=True, slots=True)
class Placed:
    model: str
    node: str


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No node is left to try. again_at: when one may be (what holds its room is in use, or has just been loaded)."""

    model: str
    again_at: float | None = None


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


Event = Asked | Left | Placed | NoPlace | Ended | Ready | Forgive | Tick


# Commands


@dataclass(frozen=True, slots=True)
class Place:
    """Find a node for it, none of `avoid`."""

    model: str
    avoid: frozenset[str]


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
    TIMED_OUT = "timed out"
    NO_PLACE = "no place"


@dataclass(frozen=True, slots=True)
class Refuse:
    """failures: of each node that was tried, or is left alone for what it did lately."""

    model: str
    waiters: tuple[Waiter, ...]
    why: Why
    failures: tuple[Failure, ...] = ()


Command = Place | Load | Serve | Refuse


# State


class Phase(Enum):
    PLACING = "placing"
    LOADING = "loading"
    RESTING = "resting"


@dataclass(frozen=True, slots=True)
class Pursuit:
    """One wanted model. node: while LOADING. wake_at: while RESTING. waiters: with deadlines, in order of arrival."""

    phase: Phase
    waiters: tuple[tuple[Waiter, float], ...] = ()
    node: str | None = None
    since: float = 0.0
    wake_at: float | None = None
    tried: tuple[Failure, ...] = ()

    def names(self) -> tuple[Waiter, ...]:
        return tuple(waiter for waiter, _ in self.waiters)


@dataclass(frozen=True, slots=True)
class State:
    """queue: how many may wait for one model."""

    queue: int
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
        case Placed(model, node) if pursuit.phase is Phase.PLACING:
            loading = replace(pursuit, phase=Phase.LOADING, node=node, since=now)
            return _with(state, model, loading), [Load(model, node)]
        case NoPlace(model, again_at) if pursuit.phase is Phase.PLACING:
            return _no_place(state, model, pursuit, again_at, now)
    return state, []


def next_wake(state: State) -> float | None:
    """When a Tick is due: the first deadline or end of a rest; None while nothing waits for time."""
    times = [deadline for pursuit in state.wanted.values() for _, deadline in pursuit.waiters]
    times += [pursuit.wake_at for pursuit in state.wanted.values() if pursuit.wake_at is not None]
    return min(times, default=None)


def _asked(state: State, event: Asked, now: float) -> Step:
    """1. The queue is full: refused. 2. Wanted already: waits with the others. 3. A new pursuit."""
    pursuit = state.wanted.get(event.model)
    if pursuit is not None and len(pursuit.waiters) >= state.queue:
        return state, [Refuse(event.model, (event.waiter,), Why.QUEUE_FULL)]
    if pursuit is not None:
        waiters = (*pursuit.waiters, (event.waiter, event.deadline))
        return _with(state, event.model, replace(pursuit, waiters=waiters)), []
    new = Pursuit(Phase.PLACING, waiters=((event.waiter, event.deadline),), since=now)
    return _place(state, event.model, new, now)


def _place(state: State, model: str, pursuit: Pursuit, now: float) -> Step:
    avoid = {f.node for f in pursuit.tried} | {r.failure.node for r in state.resting(model, now)}
    placing = replace(pursuit, phase=Phase.PLACING, node=None, wake_at=None)
    return _with(state, model, placing), [Place(model, frozenset(avoid))]


def _no_place(state: State, model: str, pursuit: Pursuit, again_at: float | None, now: float) -> Step:
    """1. A node is only busy: rest until it may be asked. 2. Everybody is told what every node said."""
    resting = state.resting(model, now)
    busy = [r.until for r in resting if r.failure.kind is Kind.BUSY]
    if again_at is not None:
        busy.append(again_at)
    if busy:
        return _with(state, model, replace(pursuit, phase=Phase.RESTING, wake_at=min(busy))), []
    told = {f.node: f for f in [*(r.failure for r in resting), *pursuit.tried]}
    return _with(state, model, None), [Refuse(model, pursuit.names(), Why.NO_PLACE, tuple(told.values()))]


def _ended(state: State, event: Ended, now: float) -> Step:
    """1. What happened is remembered, whoever began the load. 2. Loaded: everybody is served.
    3. Failed: the next node, unless nobody waits any more."""
    model, failure = event.model, event.failure
    state = _remember(state, event, now)
    pursuit = state.wanted.get(model)
    if pursuit is None or pursuit.phase is not Phase.LOADING or pursuit.node != event.node:
        return state, []
    if failure is None:
        served: list[Command] = [Serve(model, pursuit.names())] if pursuit.waiters else []
        return _with(state, model, None), served
    if not pursuit.waiters:
        return _with(state, model, None), []
    if failure.kind is not Kind.BUSY:
        pursuit = replace(pursuit, tried=(*pursuit.tried, failure))
    return _place(state, model, pursuit, now)


def _tick(state: State, now: float) -> Step:
    """1. Who waited long enough is refused. 2. Rests that are over: placed anew. 3. Old failures are forgotten."""
    commands: list[Command] = []
    for model, pursuit in list(state.wanted.items()):
        late = tuple(waiter for waiter, deadline in pursuit.waiters if deadline <= now)
        if late:
            commands.append(Refuse(model, late, Why.TIMED_OUT, pursuit.tried))
            state = _left(state, model, pursuit, frozenset(late))
        left = state.wanted.get(model)
        if left is not None and left.wake_at is not None and left.wake_at <= now:
            state, more = _place(state, model, left, now)
            commands += more
    kept = {m: {n: r for n, r in nodes.items() if now < _forgotten_at(r)} for m, nodes in state.remembered.items()}
    return replace(state, remembered={m: nodes for m, nodes in kept.items() if nodes}), commands


def _left(state: State, model: str, pursuit: Pursuit, gone: Iterable[Waiter]) -> State:
    """Without these waiters; without the pursuit where nobody waits and nothing loads."""
    waiters = tuple(w for w in pursuit.waiters if w[0] not in gone)
    over = not waiters and pursuit.phase is not Phase.LOADING
    return _with(state, model, None if over else replace(pursuit, waiters=waiters))


def _with(state: State, model: str, pursuit: Pursuit | None) -> State:
    wanted = {m: p for m, p in state.wanted.items() if m != model}
    if pursuit is not None:
        wanted[model] = pursuit
    return replace(state, wanted=wanted)


def _remember(state: State, event: Ended, now: float) -> State:
    nodes = dict(state.remembered.get(event.model, {}))
    before = nodes.pop(event.node, None)
    if event.failure is not None:
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
