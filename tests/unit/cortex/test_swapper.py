from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helexa.cortex import swapper
from helexa.cortex.swapper import (
    REST_S,
    Asked,
    Command,
    Ended,
    Event,
    Failure,
    Forgive,
    Kind,
    Left,
    Load,
    NoPlace,
    Phase,
    Place,
    Placed,
    Ready,
    Refuse,
    Serve,
    State,
    Tick,
    Why,
)


class Run:
    """A swapper with the commands of each step."""

    def __init__(self, queue: int = 8) -> None:
        self.state = State(queue=queue)
        self.now = 100.0

    def step(self, event: Event, after: float = 0.0) -> list[Command]:
        self.now += after
        self.state, commands = swapper.step(self.state, event, self.now)
        return commands

    def load_on(self, node: str, model: str = "m", waiter: int = 1, wait_s: float = 600) -> None:
        self.step(Asked(model, waiter, self.now + wait_s))
        assert self.step(Placed(model, node)) == [Load(model, node)]


def failed(node: str, kind: Kind = Kind.FAILED, **details: Any) -> Ended:
    return Ended("m", node, Failure(node, kind, f"{kind.value} on {node}", details))


def test_one_load_serves_all_who_asked_in_the_order_they_came() -> None:
    run = Run(queue=64)
    assert run.step(Asked("m", 0, 700)) == [Place("m", frozenset())]
    assert run.step(Placed("m", "beast")) == [Load("m", "beast")]
    for waiter in range(1, 50):
        assert run.step(Asked("m", waiter, 700)) == []
    assert run.step(Ended("m", "beast", None)) == [Serve("m", tuple(range(50)))]
    assert run.state.wanted == {}


def test_a_full_queue_refuses_the_next_and_keeps_the_others() -> None:
    run = Run(queue=2)
    run.load_on("beast")
    run.step(Asked("m", 2, 700))
    assert run.step(Asked("m", 3, 700)) == [Refuse("m", (3,), Why.QUEUE_FULL)]
    run.step(Left("m", 1))
    assert run.step(Asked("m", 4, 700)) == []
    assert run.step(Ready("m")) == [Serve("m", (2, 4))]


def test_no_client_fills_the_queue_and_what_leaves_gives_its_share_back() -> None:
    run = Run(queue=5)
    run.load_on("beast")
    for waiter in (2, 3, 4):
        assert run.step(Asked("m", waiter, 700, "a")) == []
    assert run.step(Asked("m", 5, 700, "a")) == [Refuse("m", (5,), Why.SHARE_FULL)]
    run.step(Left("m", 2))
    assert run.step(Asked("m", 6, 700, "a")) == []
    assert run.step(Asked("m", 7, 700, "b")) == []
    assert run.step(Asked("m", 8, 700, "b")) == [Refuse("m", (8,), Why.QUEUE_FULL)]


def test_a_model_may_have_a_bound_of_its_own() -> None:
    run = Run(queue=5)
    run.load_on("beast")
    assert run.step(Asked("m", 2, 700, room=1)) == [Refuse("m", (2,), Why.QUEUE_FULL)]
    assert run.step(Asked("m", 3, 700, room=2)) == []


def test_different_models_load_side_by_side_also_on_one_node() -> None:
    run = Run()
    run.load_on("beast", "a", waiter=1)
    run.load_on("beast", "b", waiter=2)
    assert run.step(Ended("b", "beast", None)) == [Serve("b", (2,))]
    assert run.step(Ended("a", "beast", None)) == [Serve("a", (1,))]


@pytest.mark.parametrize("kind", [Kind.FAILED, Kind.NEVER, Kind.GONE])
def test_a_load_that_failed_on_one_node_goes_to_the_next_and_at_last_everybody_is_told_every_reason(
    kind: Kind,
) -> None:
    run = Run()
    run.load_on("beast")
    assert run.step(failed("beast", kind), 1) == [Place("m", frozenset({"beast"}))]
    assert run.step(Placed("m", "benjy")) == [Load("m", "benjy")]
    assert run.step(failed("benjy"), 5) == [Place("m", frozenset({"beast", "benjy"}))]
    [refused] = run.step(NoPlace("m"))
    assert isinstance(refused, Refuse)
    assert (refused.waiters, refused.why) == ((1,), Why.NO_PLACE)
    assert {(f.node, f.kind) for f in refused.failures} == {("beast", kind), ("benjy", Kind.FAILED)}
    assert run.state.wanted == {}


def test_what_failed_lately_is_left_alone_on_that_node_and_on_no_other_and_told_without_a_new_try() -> None:
    run = Run()
    run.load_on("beast")
    run.step(failed("beast"))
    run.step(NoPlace("m"))
    assert run.step(Asked("m", 2, 900), 1) == [Place("m", frozenset({"beast"}))]
    [refused] = run.step(NoPlace("m"))
    assert isinstance(refused, Refuse)
    assert [f.reason for f in refused.failures] == ["failed on beast"]
    assert run.step(Asked("other", 3, 900)) == [Place("other", frozenset())]
    first, _ = REST_S[Kind.FAILED]
    assert run.step(Asked("m", 4, 900), first) == [Place("m", frozenset())]


def test_rests_double_up_to_a_bound_and_end_with_a_success() -> None:
    run = Run()
    first, most = REST_S[Kind.FAILED]
    rests = []
    for _ in range(10):
        run.step(failed("beast"))
        rests.append(run.state.remembered["m"]["beast"].until - run.now)
        run.now += rests[-1]
    assert rests[:3] == [first, 2 * first, 4 * first]
    assert rests[-1] == most
    run.step(Ended("m", "beast", None))
    run.step(failed("beast"))
    assert run.state.remembered["m"]["beast"].until - run.now == first


def test_an_operators_word_forgets_what_failed() -> None:
    run = Run()
    run.step(failed("beast", Kind.NEVER))
    run.step(Forgive("m"))
    assert run.step(Asked("m", 1, 900)) == [Place("m", frozenset())]


def test_old_failures_are_forgotten() -> None:
    run = Run()
    run.step(failed("beast"))
    run.step(Tick(), 11)
    assert run.state.remembered
    run.step(Tick(), 400)
    assert run.state.remembered == {}


def test_a_node_that_is_only_busy_is_waited_for() -> None:
    run = Run()
    run.load_on("beast", wait_s=600)
    run.step(failed("beast", Kind.BUSY))
    assert run.step(NoPlace("m")) == []
    assert run.state.wanted["m"].phase is Phase.RESTING
    wake = swapper.next_wake(run.state)
    assert wake == run.now + REST_S[Kind.BUSY][0]
    assert run.step(Tick(), wake - run.now) == [Place("m", frozenset())]
    assert run.step(Placed("m", "beast")) == [Load("m", "beast")]


def test_who_waited_until_its_deadline_is_refused_and_the_load_goes_on_for_the_others() -> None:
    run = Run()
    run.load_on("beast", waiter=1, wait_s=10)
    run.step(Asked("m", 2, run.now + 20))
    assert swapper.next_wake(run.state) == run.now + 10
    assert run.step(Tick(), 10) == [Refuse("m", (1,), Why.TIMED_OUT)]
    assert run.step(Ended("m", "beast", None)) == [Serve("m", (2,))]


def test_a_load_nobody_waits_for_any_more_goes_on_and_is_joined_by_whoever_asks_next() -> None:
    run = Run()
    run.load_on("beast")
    assert run.step(Left("m", 1)) == []
    assert run.step(Asked("m", 2, 900)) == []
    assert run.step(Ended("m", "beast", None)) == [Serve("m", (2,))]


def test_a_load_nobody_waits_for_is_not_tried_elsewhere_when_it_fails() -> None:
    run = Run()
    run.load_on("beast")
    run.step(Left("m", 1))
    assert run.step(failed("beast")) == []
    assert run.state.wanted == {}
    assert "beast" in run.state.remembered["m"]


def test_a_model_that_came_up_elsewhere_serves_all_and_the_load_is_still_the_only_one() -> None:
    run = Run()
    run.load_on("beast")
    assert run.step(Ready("m")) == [Serve("m", (1,))]
    assert run.step(Asked("m", 2, 900)) == []
    assert run.step(Ended("m", "beast", None)) == [Serve("m", (2,))]


@pytest.mark.parametrize(
    "event",
    [Left("m", 9), Placed("m", "b"), NoPlace("m"), Ready("m"), Ended("m", "b", None), Tick(), Forgive("m")],
)
def test_an_event_that_comes_late_or_twice_changes_nothing(event: Event) -> None:
    run = Run()
    before = run.state
    assert run.step(event) == []
    assert run.state == before
    run.load_on("beast")
    before = run.state
    if not isinstance(event, Ready):
        assert run.step(event) == []
        assert run.state == before


NODES = ("a", "b", "c")
MODELS = ("x", "y")
WAIT_S = 50.0


class AnyFleet(RuleBasedStateMachine):
    """The swapper against a loader that obeys, a fleet that does anything, and a clock that only goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.state = State(queue=3)
        self.ids = 0
        self.waiting: dict[int, tuple[str, float]] = {}
        self.loads: set[tuple[str, str]] = set()
        self.absent: set[str] = set()  # nodes that no placement finds now

    def feed(self, event: Event) -> None:
        self.state, commands = swapper.step(self.state, event, self.now)
        for command in commands:
            self.carry_out(command)

    def carry_out(self, command: Command) -> None:
        match command:
            case Place(model, avoid):
                able = [n for n in NODES if n not in avoid and n not in self.absent]
                self.feed(Placed(model, able[0]) if able else NoPlace(model))
            case Load(model, node):
                assert not any(m == model for m, _ in self.loads), "a load runs once"
                self.loads.add((model, node))
            case Serve(_, waiters) | Refuse(_, waiters):
                assert waiters
                for waiter in waiters:
                    del self.waiting[waiter]  # answered once, and only if it waits

    @rule(model=st.sampled_from(MODELS))
    def ask(self, model: str) -> None:
        self.ids += 1
        self.waiting[self.ids] = (model, self.now + WAIT_S)
        self.feed(Asked(model, self.ids, self.now + WAIT_S))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        model, _ = self.waiting.pop(waiter)
        self.feed(Left(model, waiter))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), kind=st.none() | st.sampled_from([k for k in Kind if k is not Kind.DIFFERENT]))
    def load_ends(self, data: st.DataObject, kind: Kind | None) -> None:
        model, node = data.draw(st.sampled_from(sorted(self.loads)))
        self.loads.remove((model, node))
        self.feed(Ended(model, node, None if kind is None else Failure(node, kind, "why")))

    @rule(model=st.sampled_from(MODELS))
    def somebody_else_loaded_it(self, model: str) -> None:
        self.feed(Ready(model))

    @rule(model=st.sampled_from(MODELS))
    def forgive(self, model: str) -> None:
        self.feed(Forgive(model))

    @rule(node=st.sampled_from(NODES))
    def node_goes_or_comes(self, node: str) -> None:
        self.absent ^= {node}

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := swapper.next_wake(self.state)) is not None and due <= until:
            assert due >= self.now
            self.now = due
            self.feed(Tick())
        self.now = until

    @invariant()
    def who_waits_is_known_to_a_pursuit_and_to_no_other(self) -> None:
        known = {w: (m, deadline) for m, p in self.state.wanted.items() for w, deadline in p.waiters}
        assert known == self.waiting

    @invariant()
    def nobody_waits_beyond_its_deadline(self) -> None:
        assert all(deadline > self.now for _, deadline in self.waiting.values())

    @invariant()
    def no_queue_is_over_its_bound(self) -> None:
        assert all(len(p.waiters) <= self.state.queue for p in self.state.wanted.values())

    @invariant()
    def everything_that_is_wanted_can_progress(self) -> None:
        for model, pursuit in self.state.wanted.items():
            match pursuit.phase:
                case Phase.LOADING:
                    assert (model, pursuit.node) in self.loads
                case Phase.RESTING:
                    assert pursuit.wake_at is not None
                    assert pursuit.waiters
                case Phase.PLACING:
                    raise AssertionError("a question that nobody answered")

    def teardown(self) -> None:
        self.now += WAIT_S
        self.feed(Tick())
        assert not self.waiting
        for model, node in list(self.loads):
            self.loads.remove((model, node))
            self.feed(Ended(model, node, None))
        assert self.state.wanted == {}


TestAnyFleet = AnyFleet.TestCase
TestAnyFleet.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_where_there_will_be_room_the_model_is_placed_again_then() -> None:
    run = Run()
    run.step(Asked("m", 1, run.now + 60))
    assert run.step(NoPlace("m", again_at=run.now + 4)) == []
    assert swapper.next_wake(run.state) == run.now + 4
    assert run.step(Tick(), after=4) == [Place("m", frozenset())]
