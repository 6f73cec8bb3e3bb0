"""The whole policy of loading against a fleet that does anything: swapper and placement together, on invented nodes.

What is held: memory is never over-committed, pinned and in-use models never go, every waiter is answered by its
deadline, a load runs once, no plan evicts what it does not need, no client fills a queue, and nothing that is wanted
stands still. Nodes die and come back, loads fail in every way, and another gateway loads and unloads as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helexa.core.lifecycle import ModelStatus
from helexa.cortex import placement, swapper
from helexa.cortex.eviction import POLICIES, Resident
from helexa.cortex.plans import DeviceView, Need, NodeView, NoPlan, Plan, Wanted
from helexa.cortex.swapper import (
    Asked,
    Clear,
    Cleared,
    Command,
    Ended,
    Event,
    Failure,
    Kind,
    Left,
    Load,
    NoPlace,
    Phase,
    Place,
    Placed,
    Ready,
    Refuse,
    Room,
    Serve,
    State,
    Tick,
)

NODES = {"big": 10, "small": 6}
MODELS = {"two": 2, "three": 3, "five": 5, "six": 6, "nine": 9, "never": 11}
PINNED = {("two", "big")}
WAIT_S = 60.0


@dataclass
class Held:
    """One model on one node."""

    status: ModelStatus
    in_use: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0


class Policy(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.state = State(queue=4, drain_after_s=10.0)
        self.held: dict[tuple[str, str], Held] = {}
        self.promised: dict[tuple[str, str], int] = {}
        self.clears: dict[str, Clear] = {}
        self.loads: set[tuple[str, str]] = set()
        self.waiting: dict[int, tuple[str, float]] = {}
        self.ids = 0
        self.down: set[str] = set()
        self.clients: dict[int, str] = {}

    # the loader's part

    def feed(self, event: Event) -> None:
        self.state, commands = swapper.step(self.state, event, self.now)
        for command in commands:
            self.carry_out(command)
        for model, node in list(self.promised):
            pursuit = self.state.wanted.get(model)
            if pursuit is None or (pursuit.node != node and pursuit.phase is not Phase.PLACING):
                del self.promised[model, node]

    def carry_out(self, command: Command) -> None:
        match command:
            case Place():
                self.feed(self.place(command))
            case Clear(_, node, victim, drain):
                held = self.held[victim, node]
                assert held.status is ModelStatus.LOADED
                assert (victim, node) not in PINNED, "a pinned model never goes"
                assert drain or not held.in_use, "a model in use never goes"
                held.status = ModelStatus.UNLOADING
                self.clears[command.model] = command
            case Load(model, node):
                self.promised.pop((model, node))
                assert not any(m == model for m, _ in self.loads), "a load runs once"
                assert node not in self.down
                assert self.used(node) + MODELS[model] <= NODES[node], "memory is never over-committed"
                self.loads.add((model, node))
                self.held[model, node] = Held(ModelStatus.LOADING)
            case Serve(model, waiters):
                # more than one, where it was loaded anew while a drain of the first ran, and the drain ran out
                held, *_ = [h for (m, _), h in self.held.items() if m == model and h.status is ModelStatus.LOADED]
                for waiter in waiters:
                    del self.waiting[waiter]
                    held.in_use += 1
            case Refuse(_, waiters):
                for waiter in waiters:
                    del self.waiting[waiter]

    def place(self, command: Place) -> Event:
        model = command.model
        for key in [key for key in self.promised if key[0] == model]:
            del self.promised[key]
        views = [self.view(name) for name in NODES if name not in command.avoid | self.down]
        wanted = Wanted(model, Need((MODELS[model],), "vram_mb"))
        found = placement.plan(views, wanted, POLICIES["adaptive"], self.now, drain=command.drain)
        if isinstance(found, NoPlan):
            return NoPlace(model, None if found.is_never else self.now + 1)
        self.check(found)
        self.promised[model, found.node] = MODELS[model]
        return Placed(model, found.node, found.victims, found.drains)

    def check(self, plan: Plan) -> None:
        [device] = self.view(plan.node).devices
        sizes = [MODELS[victim] for victim in plan.victims]
        shortfall = max(0, device.reserved_mb - (device.free_mb or 0))
        for size in sizes:
            left = device.room_mb + sum(sizes) - size - shortfall
            assert left < MODELS[plan.model], "no plan evicts what it does not need"

    def view(self, name: str) -> NodeView:
        residents = [
            Resident(
                model=model,
                memory_mb={0: MODELS[model]},
                state=held.status,
                in_use=held.in_use,
                pinned=(model, node) in PINNED,
                last_used=held.last_used,
                loaded_at=held.loaded_at,
                min_residency_s=2.0,
            )
            for (model, node), held in self.held.items()
            if node == name
        ]
        promised = sum(mb for (_, node), mb in self.promised.items() if node == name)
        free = NODES[name] - self.used(name)
        device = DeviceView(index=0, total_mb=NODES[name], free_mb=free, reserved_mb=promised)
        return NodeView(name=name, devices=[device], residents=residents)

    def used(self, name: str) -> int:
        return sum(MODELS[model] for model, node in self.held if node == name)

    # what happens

    @rule(model=st.sampled_from(sorted(MODELS)), client=st.sampled_from("ab"))
    def ask(self, model: str, client: str) -> None:
        for (held_model, _), held in self.held.items():
            if held_model == model and held.status is ModelStatus.LOADED:
                held.in_use += 1
                return
        self.ids += 1
        self.waiting[self.ids] = (model, self.now + WAIT_S)
        self.clients[self.ids] = client
        before = self.state.wanted.get(model)
        self.feed(Asked(model, self.ids, self.now + WAIT_S, client))
        if before is not None and len(before.waiters) < self.state.queue and client not in before.clients.values():
            assert self.ids in self.waiting, "a client that has no place gets one while there is any"

    @precondition(lambda self: any(held.in_use for held in self.held.values()))
    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        held = self.held[data.draw(st.sampled_from(sorted(k for k, h in self.held.items() if h.in_use)))]
        held.in_use -= 1
        held.last_used = self.now
        self.feed(Room())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        self.feed(Left(self.waiting.pop(waiter)[0], waiter))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), kind=st.none() | st.sampled_from([k for k in Kind if k is not Kind.DIFFERENT]))
    def load_ends(self, data: st.DataObject, kind: Kind | None) -> None:
        model, node = data.draw(st.sampled_from(sorted(self.loads)))
        self.loads.remove((model, node))
        if kind is None:
            self.held[model, node] = Held(ModelStatus.LOADED, 0, self.now, self.now)
            self.feed(Ended(model, node, None))
        else:
            del self.held[model, node]
            self.feed(Ended(model, node, Failure(node, kind, "why")))

    @precondition(lambda self: self.clears)
    @rule(data=st.data(), busy=st.booleans())
    def clear_ends(self, data: st.DataObject, busy: bool) -> None:
        """busy: another gateway's request came, or the drain ran out."""
        model = data.draw(st.sampled_from(sorted(self.clears)))
        command = self.clears.pop(model)
        held = self.held[command.victim, command.node]
        if busy or held.in_use:
            held.status = ModelStatus.LOADED
            self.feed(Ready(command.victim))
            self.feed(Cleared(model, command.node, Failure(command.node, Kind.BUSY, "in use")))
        else:
            del self.held[command.victim, command.node]
            self.feed(Cleared(model, command.node, None))

    @precondition(lambda self: len(self.down) < len(NODES))
    @rule(data=st.data())
    def node_dies(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(NODES.keys() - self.down)))
        self.down.add(name)
        gone = Failure(name, Kind.GONE, "died")
        for key in [key for key in self.held if key[1] == name]:
            del self.held[key]
        for model in [model for model, command in self.clears.items() if command.node == name]:
            del self.clears[model]
            self.feed(Cleared(model, name, gone))
        for model, node in [load for load in self.loads if load[1] == name]:
            self.loads.remove((model, node))
            self.feed(Ended(model, node, gone))

    @precondition(lambda self: self.down)
    @rule(data=st.data())
    def node_returns(self, data: st.DataObject) -> None:
        self.down.remove(data.draw(st.sampled_from(sorted(self.down))))
        self.feed(Room())

    @rule(model=st.sampled_from(sorted(MODELS)), name=st.sampled_from(sorted(NODES)))
    def another_gateway_loads(self, model: str, name: str) -> None:
        fits = name not in self.down and self.used(name) + MODELS[model] <= NODES[name]
        if fits and not any(m == model for m, _ in self.held) and model not in self.state.wanted:
            self.held[model, name] = Held(ModelStatus.LOADED, 0, self.now, self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def another_gateway_unloads(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[key]
        if held.status is ModelStatus.LOADED and not held.in_use:
            del self.held[key]
            self.feed(Room())

    @rule(seconds=st.floats(0.1, 20))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := swapper.next_wake(self.state)) is not None and due <= until:
            self.now = max(self.now, due)
            self.feed(Tick())
        self.now = until

    # what holds

    @invariant()
    def memory_is_never_over_committed(self) -> None:
        assert all(self.used(name) <= total for name, total in NODES.items())

    @invariant()
    def nobody_waits_beyond_its_deadline_and_everybody_who_waits_is_known(self) -> None:
        assert all(deadline > self.now for _, deadline in self.waiting.values())
        assert {w for p in self.state.wanted.values() for w, _ in p.waiters} == set(self.waiting)

    @invariant()
    def no_client_fills_a_queue(self) -> None:
        for pursuit in self.state.wanted.values():
            names = list(pursuit.clients.values())
            assert len(names) <= self.state.queue
            assert all(names.count(client) < self.state.queue for client in names)

    @invariant()
    def everything_that_is_wanted_can_progress(self) -> None:
        for model, pursuit in self.state.wanted.items():
            match pursuit.phase:
                case Phase.LOADING:
                    assert (model, pursuit.node) in self.loads
                case Phase.CLEARING:
                    assert self.clears[model].node == pursuit.node
                case Phase.RESTING:
                    assert pursuit.wake_at is not None
                    assert pursuit.waiters
                case Phase.PLACING:
                    raise AssertionError("a question that nobody answered")

    def teardown(self) -> None:
        """Everything ends: requests, unloads, loads; then who still waits is served or told why."""
        for _ in range(200):
            for held in self.held.values():
                held.in_use = 0
            if self.clears:
                model, command = self.clears.popitem()
                del self.held[command.victim, command.node]
                self.feed(Cleared(model, command.node, None))
            elif self.loads:
                model, node = self.loads.pop()
                self.held[model, node] = Held(ModelStatus.LOADED, 0, self.now, self.now)
                self.feed(Ended(model, node, None))
            elif self.state.wanted:
                due = swapper.next_wake(self.state)
                assert due is not None
                self.now = max(self.now, due)
                self.feed(Tick())
            else:
                break
        assert not self.waiting
        assert not self.state.wanted


TestPolicy = Policy.TestCase
TestPolicy.settings = hypothesis_settings(max_examples=120, stateful_step_count=60, deadline=None)
