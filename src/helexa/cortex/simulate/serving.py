"""Conversations over the loaded replicas of one model: what a way of routing makes of their prompt caches.

Nothing is loaded or unloaded here. A replica computes prompts one at a time, the rest in turn; runs so many requests at
once, each decoding at its own speed; and keeps what its cache has room for. A conversation's next turn comes some time
after the answer to the last one, so that a slow fleet is asked less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from helexa.cortex import router
from helexa.cortex.prefixes import Prompt
from helexa.cortex.router import WEIGHT_OF_TOKEN, ModelRouter
from helexa.cortex.simulate.caches import EngineCache, Pool
from helexa.cortex.work import Ticket, Work

if TYPE_CHECKING:
    from helexa.cortex.nodes import Replica


@dataclass(frozen=True, slots=True)
class Engine:
    """Of each replica. prefill, decode: tokens a second, of a prompt and of one answer."""

    prefill: float = 3_000.0
    decode: float = 40.0
    slots: int = 16
    cache: Callable[[], EngineCache] = lambda: Pool(50_000)


@dataclass(frozen=True, slots=True)
class Turn:
    """think_s: from the answer before it. tokens: by which the prompt grows beyond that answer."""

    think_s: float
    tokens: int
    output: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """opening: the id of what all conversations of its kind begin with, and its tokens."""

    start: float
    opening: tuple[int, int]
    turns: Sequence[Turn]


@dataclass(slots=True)
class Asked:
    """One request. t_first_token is what the router looks at."""

    conversation: int
    t: float
    ids: Sequence[int]
    ends: Sequence[int]
    output: int
    computed: int = 0
    t_first_token: float = 0.0

    @property
    def prompt(self) -> Prompt:
        ends = [end * WEIGHT_OF_TOKEN for end in self.ends]
        return Prompt(self.ids, ends, ends[-1])


@dataclass(frozen=True, slots=True)
class SimNode:
    name: str
    state: str = "up"


class ServingReplica:
    """node, inflight, others, work are what the router looks at. busy: the integral of inflight over time."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.engine = engine
        self.node = SimNode(name)
        self.inflight = 0
        self.others = 0
        self.work = Work()
        self.work.slots = engine.slots
        self.cache = engine.cache()
        self.running = 0
        self.waiting: deque[_Running] = deque()  # for a slot
        self.prompts: deque[_Running] = deque()  # to be computed; the first one is being
        self.busy, self.changed_at = 0.0, 0.0

    def count(self, by: int, now: float) -> None:
        self.busy += self.inflight * (now - self.changed_at)
        self.changed_at = now
        self.inflight += by


class Rule(Protocol):
    """A way of routing."""

    def choose(self, asked: Asked, replicas: Sequence[ServingReplica], now: float) -> ServingReplica: ...

    def ended(self, asked: Asked, replica: ServingReplica, now: float) -> None: ...


class LeastLoad:
    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def choose(self, asked: Asked, replicas: Sequence[ServingReplica], now: float) -> ServingReplica:
        return cast("ServingReplica", router.choose(cast("Sequence[Replica]", replicas), (), self._rng))

    def ended(self, asked: Asked, replica: ServingReplica, now: float) -> None:
        pass


class Ours:
    """The gateway's own router, told what the gateway is told."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self.model = ModelRouter()
        self._tickets: dict[int, Ticket] = {}

    def choose(self, asked: Asked, replicas: Sequence[ServingReplica], now: float) -> ServingReplica:
        live = cast("Sequence[Replica]", replicas)
        choice = self.model.choose(live, (), asked.prompt, now, self._rng)
        assert choice is not None
        self._tickets[id(asked)] = self.model.sent(choice, asked, now, is_told=True)
        return cast("ServingReplica", choice.replica)

    def ended(self, asked: Asked, replica: ServingReplica, now: float) -> None:
        tokens, took_ms = asked.ends[-1], 1000 * asked.computed / replica.engine.prefill
        replica.work.timed({"prompt_n": asked.computed, "prompt_ms": took_ms})
        ticket = self._tickets.pop(id(asked))
        self.model.ended(ticket, now, prompt_tokens=tokens, cached_tokens=tokens - asked.computed)


@dataclass(frozen=True, slots=True)
class Served:
    """What a run came to, of the requests after the warm-up. first_token_s: sorted. busiest: the time-averaged requests
    of the replica that had most, by the mean of all. prefill_busy: the share of time that prompts were computed."""

    requests: int
    prompt_tokens: int
    computed: int
    first_token_s: Sequence[float]
    busiest: float
    prefill_busy: float

    def within_s(self, share: float) -> float:
        """The time to the first token that this share of the requests stays within."""
        return self.first_token_s[min(len(self.first_token_s) - 1, int(share * len(self.first_token_s)))]


@dataclass(slots=True)
class _Talk:
    """A conversation as far as it has come."""

    said: Conversation
    number: int
    turn: int = 0
    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def grow(self, tokens: int) -> None:
        self.ids.append(hash((self.number, len(self.ids))))
        self.ends.append(self.ends[-1] + tokens)


class Serving:
    """One run. seconds: how long conversations begin; warm_s: of that, how long nothing is counted."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        rule: Rule,
        engine: Engine,
        *,
        replicas: int = 3,
        seconds: float,
        warm_s: float = 0.0,
    ) -> None:
        self._rule = rule
        self._engine = engine
        self._replicas = [ServingReplica(f"n{at}", engine) for at in range(replicas)]
        self._until, self._warm_s = seconds, warm_s
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._number = 0
        self._now = 0.0
        self._done: list[Asked] = []
        self._computing_s = 0.0
        for number, said in enumerate(conversations):
            key, tokens = said.opening
            self._at(said.start, self._ask, _Talk(said, number, ids=[key], ends=[tokens]))

    def run(self) -> Served:
        while self._events and self._events[0][0] <= self._until:
            self._now, _, call, what = heappop(self._events)
            call(what)
        for replica in self._replicas:
            replica.count(0, self._until)
        counted = [asked for asked in self._done if asked.t >= self._warm_s]
        mean = sum(r.busy for r in self._replicas) / len(self._replicas)
        return Served(
            requests=len(counted),
            prompt_tokens=sum(asked.ends[-1] for asked in counted),
            computed=sum(asked.computed for asked in counted),
            first_token_s=sorted(asked.t_first_token - asked.t for asked in counted),
            busiest=max(r.busy for r in self._replicas) / mean if mean else 1.0,
            prefill_busy=self._computing_s / self._until / len(self._replicas),
        )

    def _ask(self, talk: _Talk) -> None:
        turn = talk.said.turns[talk.turn]
        talk.grow(turn.tokens)
        asked = Asked(talk.number, self._now, tuple(talk.ids), tuple(talk.ends), turn.output)
        replica = self._rule.choose(asked, self._replicas, self._now)
        replica.count(1, self._now)
        what = (replica, asked, talk)
        if replica.running < self._engine.slots:
            self._run(what)
        else:
            replica.waiting.append(what)

    def _run(self, what: _Running) -> None:
        """It has a slot."""
        replica = what[0]
        replica.running += 1
        replica.prompts.append(what)
        if len(replica.prompts) == 1:
            self._compute(what)

    def _compute(self, what: _Running) -> None:
        replica, asked, _ = what
        asked.computed = max(1, asked.ends[-1] - replica.cache.held(asked.ids, asked.ends))
        took_s = asked.computed / self._engine.prefill
        self._computing_s += took_s
        self._at(self._now + took_s, self._first_token, what)

    def _first_token(self, what: _Running) -> None:
        replica, asked, _ = what
        asked.t_first_token = self._now
        replica.cache.keep(asked.ids, asked.ends)
        self._at(self._now + asked.output / self._engine.decode, self._finished, what)
        replica.prompts.popleft()
        if replica.prompts:
            self._compute(replica.prompts[0])

    def _finished(self, what: _Running) -> None:
        replica, asked, talk = what
        replica.running -= 1
        replica.count(-1, self._now)
        talk.grow(asked.output)
        replica.cache.keep(tuple(talk.ids), tuple(talk.ends))
        self._rule.ended(asked, replica, self._now)
        self._done.append(asked)
        if replica.waiting:
            self._run(replica.waiting.popleft())
        talk.turn += 1
        if talk.turn < len(talk.said.turns):
            self._at(self._now + talk.said.turns[talk.turn].think_s, self._ask, talk)

    def _at(self, when: float, call: Callable[[Any], None], what: Any) -> None:
        self._number += 1
        heappush(self._events, (when, self._number, call, what))


_Running: TypeAlias = tuple[ServingReplica, Asked, _Talk]
