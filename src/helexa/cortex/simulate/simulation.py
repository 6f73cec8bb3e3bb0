"""One run: a trace over a fleet under one policy, event by event.

What the loader does with awaits and HTTP is done here with a heap of events: the swapper's commands are carried out,
placements asked for, victims unloaded (at once where they are idle, after their last request where they are drained).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

from helexa.core.lifecycle import ModelStatus
from helexa.cortex import placement, router, swapper
from helexa.cortex.eviction import POLICIES, Policy
from helexa.cortex.plans import NodeView, NoPlan, Plan, Wanted
from helexa.cortex.prefixes import Prompt
from helexa.cortex.simulate.results import NodeUse, Results
from helexa.cortex.simulate.trace import Request
from helexa.cortex.simulate.world import Model, NodeSpec, SimModel, SimNode, SimReplica
from helexa.cortex.work import Ticket

if TYPE_CHECKING:
    from helexa.cortex.nodes import Replica

LOOK_AGAIN_S: Final = 1.0  # for room, while everything is in use and nothing becomes idle
COPY_AT_QUEUE: Final = 4  # a second copy into free room; at 1 it only costs
# A copy in place of what is cold. Without it a saturated model of a full fleet keeps its queue for hours: on W4 waiting
# falls from 20 s to 0.2 s in the mean for 2 % more loads. At 4 those are 9 %.
DISPLACE_AT_QUEUE: Final = 16

Placer = Callable[..., Plan | NoPlan]  # placement.plan, or what it is compared with


@dataclass(frozen=True, slots=True)
class Rules:
    """What is compared. copies: a second copy of a model whose queue is long, where there is room for it; from
    displace_at_queue on also where something has to go for it."""

    name: str
    policy: Policy = POLICIES["adaptive"]
    place: Placer = placement.plan
    wait_s: float = 600.0
    queue: int = 10**9
    copies: bool = True
    displace_at_queue: float = DISPLACE_AT_QUEUE


@dataclass(slots=True)
class _Asked:
    """What the router sees of a request, and what it took."""

    t_first_token: float = 0.0
    computed: int = 0


class Simulation:
    def __init__(
        self,
        nodes: Iterable[NodeSpec],
        models: Iterable[Model],
        requests: Sequence[Request],
        rules: Rules,
        *,
        seed: int = 0,
    ) -> None:
        self._rules = rules
        self._requests = requests
        self._rng = Random(seed)
        self._nodes = {spec.name: SimNode(spec) for spec in nodes}
        self._models = {m.id: SimModel(m, m.wanted()) for m in models}
        self._state = swapper.State(queue=rules.queue)
        self._feeding: deque[swapper.Event] = deque()
        self._stepping = False
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._number = 0
        self._tick_at = inf
        self._now = 0.0
        self._waits = array("d", bytes(8 * len(requests)))
        self._routed: dict[int, tuple[_Asked, Ticket]] = {}  # by request
        self._computed = 0  # tokens of prompts
        self._loads = self._copies = self._evictions = self._drains = self._cold = 0
        self._load_s = 0.0
        self._refused: list[int] = []

    def run(self) -> Results:
        requests, events = self._requests, self._events
        at, count = 0, len(requests)
        while at < count or events:
            if at < count and (not events or requests[at].t <= events[0][0]):
                self._now = requests[at].t
                self._arrived(at)
                at += 1
            else:
                self._now, _, call, what = heappop(events)
                call(what)
        return self._results()

    # requests

    def _arrived(self, number: int) -> None:
        request = self._requests[number]
        model = self._models[request.model]
        model.usage = model.usage.used(self._now)
        if not self._serve(number, model):
            self._cold += 1
            self._feed(swapper.Asked(request.model, number, self._now + self._rules.wait_s))

    def _serve(self, number: int, model: SimModel) -> bool:
        """Sends it where the router says; False where nothing can be asked."""
        if not model.live:
            return False
        replica = self._choose(number, model)
        replica.inflight += 1
        replica.last_used = self._now
        replica.node.view = None
        if replica.running < model.spec.slots:
            self._start(number, replica)
        else:
            replica.waiting.append(number)
            if len(replica.waiting) >= COPY_AT_QUEUE and self._rules.copies:
                self._copy(model, may_displace=len(replica.waiting) >= self._rules.displace_at_queue)
        return True

    def _choose(self, number: int, model: SimModel) -> SimReplica:
        """As the gateway does: a prompt is looked at where there is a choice, and a cache."""
        live = cast("list[Replica]", model.live)
        request = self._requests[number]
        if len(live) < 2 or not request.prefix or not model.spec.cache_tokens:
            return cast("SimReplica", router.choose(live, (), self._rng))
        ends = [end * router.WEIGHT_OF_TOKEN for end in request.marks]
        prompt = Prompt(request.prefix, ends, request.prompt_tokens * router.WEIGHT_OF_TOKEN)
        choice = model.router.choose(live, (), prompt, self._now, self._rng)
        assert choice is not None
        asked = _Asked()
        self._routed[number] = asked, model.router.sent(choice, asked, self._now, is_told=True)
        return cast("SimReplica", choice.replica)

    def _start(self, number: int, replica: SimReplica) -> None:
        request, spec = self._requests[number], replica.model.spec
        self._waits[number] = self._now - request.t
        replica.running += 1
        computed = request.prompt_tokens
        if replica.cache is not None and request.prefix:
            marks = request.marks
            computed -= replica.cache.held(request.prefix, marks)
            replica.cache.keep(request.prefix, marks)
        self._computed += computed
        if number in self._routed:
            self._at(self._now + spec.prefill_s(computed), self._first_token, (number, replica, computed))
        self._at(self._now + spec.seconds(computed, request.output_tokens), self._finished, (number, replica))

    def _first_token(self, what: tuple[int, SimReplica, int]) -> None:
        number, replica, computed = what
        asked, _ = self._routed[number]
        asked.t_first_token = self._now
        replica.work.timed({"prompt_n": computed, "prompt_ms": 1000 * replica.model.spec.prefill_s(computed)})
        asked.computed = computed

    def _finished(self, what: tuple[int, SimReplica]) -> None:
        number, replica = what
        if number in self._routed:
            asked, ticket = self._routed.pop(number)
            tokens = self._requests[number].prompt_tokens
            model = replica.model
            model.router.ended(ticket, self._now, prompt_tokens=tokens, cached_tokens=tokens - asked.computed)
        replica.running -= 1
        replica.inflight -= 1
        replica.last_used = self._now
        replica.node.view = None
        if replica.waiting:
            self._start(replica.waiting.popleft(), replica)
        elif replica.inflight == 0:
            if replica.on_idle is not None:
                self._unload(replica)
                self._feed(swapper.Cleared(replica.on_idle, replica.node.name, None))
            if self._state.wanted:
                self._feed(swapper.Room())

    # the loader's hands

    def _feed(self, event: swapper.Event) -> None:
        self._feeding.append(event)
        if self._stepping:
            return
        self._stepping = True
        while self._feeding:
            self._state, commands = swapper.step(self._state, self._feeding.popleft(), self._now)
            for command in commands:
                self._carry_out(command)
        self._stepping = False
        due = swapper.next_wake(self._state)
        if due is not None and due < self._tick_at:
            self._tick_at = max(due, self._now)
            self._at(self._tick_at, self._tick, None)

    def _tick(self, _: None) -> None:
        self._tick_at = inf
        self._feed(swapper.Tick())

    def _carry_out(self, command: swapper.Command) -> None:
        match command:
            case swapper.Place(model, _, drain):
                self._feed(self._place(model, drain=drain))
            case swapper.Clear(model, name, victim, _):
                self._clear(model, self._nodes[name], victim)
            case swapper.Load(model, name):
                self._loads += 1
                self._load(self._models[model], self._nodes[name])
            case swapper.Serve(model, waiters):
                for waiter in waiters:
                    served = self._serve(cast("int", waiter), self._models[model])
                    assert served
            case swapper.Refuse(_, waiters):
                for waiter in waiters:
                    self._refused.append(cast("int", waiter))

    def _place(self, name: str, *, drain: bool) -> swapper.Event:
        """1. A plan, what it takes promised to it. 2. With victims that finish first, where that is allowed.
        3. Later; or never."""
        for node in self._nodes.values():
            if node.promises.pop(name, None) is not None:
                node.view = None
        wanted = self._models[name].wanted
        found = self._plan(wanted)
        if isinstance(found, NoPlan) and drain and not found.is_never:
            found = self._plan(wanted, drain=True)
        if isinstance(found, Plan):
            self._promise(found)
            return swapper.Placed(name, found.node, found.victims, found.drains)
        if found.is_never:
            return swapper.NoPlace(name)
        soon = found.again_at
        again_at = self._now + LOOK_AGAIN_S if soon is None else min(self._now + LOOK_AGAIN_S, soon)
        return swapper.NoPlace(name, again_at=max(again_at, self._now + 0.01))

    def _promise(self, plan: Plan) -> None:
        """Before the next placement, of the same step perhaps, looks for room."""
        node = self._nodes[plan.node]
        node.promises[plan.model] = dict(zip(plan.devices, plan.parts_mb, strict=True))
        node.view = None

    def _clear(self, model: str, node: SimNode, victim: str) -> None:
        """Unloads it, at once or after its last request."""
        replica = node.replicas.get(victim)
        if replica is None or replica.on_idle is not None:
            failure = swapper.Failure(node.name, swapper.Kind.BUSY, f"{victim} is being unloaded")
            self._feed(swapper.Cleared(model, node.name, failure))
            return
        self._evictions += 1
        if replica.inflight == 0:
            self._unload(replica)
            self._feed(swapper.Cleared(model, node.name, None))
        else:
            self._drains += 1
            self._leave(replica)
            replica.on_idle = model

    def _plan(self, wanted: Wanted, *, drain: bool = False) -> Plan | NoPlan:
        return self._rules.place(self._views(), wanted, self._rules.policy, self._now, drain=drain)

    def _views(self) -> list[NodeView]:
        return [node.view or node.as_seen(self._now) for node in self._nodes.values()]

    def _copy(self, model: SimModel, *, may_displace: bool) -> None:
        """Another one; into free room, unless it may displace something."""
        held = len(model.live) + model.loading
        if model.loading or held >= (model.spec.max_replicas or inf):
            return
        found = self._plan(model.wanted)
        if isinstance(found, Plan) and (may_displace or not found.victims):
            self._copies += 1
            node = self._nodes[found.node]
            for name in found.victims:
                self._evictions += 1
                self._unload(node.replicas[name])
            self._promise(found)
            self._load(model, node)

    def _load(self, model: SimModel, node: SimNode) -> None:
        """Into the room that was promised."""
        replica = SimReplica(model, node, node.promises.pop(model.spec.id))
        node.replicas[model.spec.id] = replica
        model.loading += 1
        node.take(replica.memory_mb, 1, self._now)
        replica.load_s = node.load_s(model.spec.mb)
        self._load_s += replica.load_s
        node.loads_until = max(node.loads_until, self._now) + replica.load_s
        self._at(node.loads_until, self._loaded, replica)

    def _loaded(self, replica: SimReplica) -> None:
        model, node = replica.model, replica.node
        replica.status = ModelStatus.LOADED
        replica.loaded_at = replica.last_used = self._now
        model.loading -= 1
        model.live.append(replica)
        self._stale(model)
        name = model.spec.id
        wanted = self._state.wanted.get(name)
        if wanted is not None and wanted.node == node.name:
            self._feed(swapper.Ended(name, node.name, None))
        else:
            self._feed(swapper.Ready(name))

    def _leave(self, replica: SimReplica) -> None:
        """No new request goes there."""
        replica.status = ModelStatus.UNLOADING
        replica.model.live.remove(replica)
        replica.model.router.keep_only(cast("list[Replica]", replica.model.live))
        self._stale(replica.model)
        replica.node.view = None

    def _unload(self, replica: SimReplica) -> None:
        if replica.status is ModelStatus.LOADED:
            self._leave(replica)
        del replica.node.replicas[replica.model.spec.id]
        replica.node.take(replica.memory_mb, -1, self._now)

    def _stale(self, model: SimModel) -> None:
        for replica in model.live:
            replica.node.view = None

    def _at(self, when: float, call: Callable[..., None], what: Any) -> None:
        self._number += 1
        heappush(self._events, (when, self._number, call, what))

    def _results(self) -> Results:
        refused = set(self._refused)
        waits = [wait for number, wait in enumerate(self._waits) if number not in refused]
        for node in self._nodes.values():
            node.take({}, 1, self._now)
        return Results(
            name=self._rules.name,
            requests=len(self._requests),
            seconds=self._now,
            refused=len(refused),
            cold_starts=self._loads,
            cold_requests=self._cold,
            copies=self._copies,
            evictions=self._evictions,
            drains=self._drains,
            load_seconds=self._load_s,
            waits=sorted(waits),
            nodes=[
                NodeUse(n.name, n.total_mb, n.mb_seconds / max(self._now, 1e-9), n.peak_mb)
                for n in self._nodes.values()
            ],
            prompt_tokens=sum(r.prompt_tokens for i, r in enumerate(self._requests) if i not in refused),
            computed_tokens=self._computed,
            output_tokens=sum(r.output_tokens for i, r in enumerate(self._requests) if i not in refused),
        )
