from __future__ import annotations

import pytest

from helexa.cortex import swapper
from helexa.cortex.load_watch import STILL_S, UNTOLD_STILL_S, LoadWatch
from helexa.cortex.swapper import Asked, Failure, Kind, NoPlace, Placed, State, Tick


class Run:
    """A swapper under watch. marks: what the nodes say of their loads."""

    def __init__(self) -> None:
        self.state = State(queue=8)
        self.marks: dict[tuple[str, str], object] = {}
        self.watch = LoadWatch(lambda model, node: self.marks.get((model, node)))  # type: ignore[arg-type,return-value]

    def at(self, now: float, *events: swapper.Event) -> None:
        for event in events:
            self.state, _ = swapper.step(self.state, event, now)
        self.watch.look(self.state, now)

    def said(self, now: float) -> list[str]:
        return self.watch.still(self.state, now)


def loading() -> Run:
    run = Run()
    run.at(0.0, Asked("m", 1, 10_000.0), Placed("m", "beast"))
    return run


def test_a_load_that_gets_on_is_well_however_long_it_takes() -> None:
    run = loading()
    for percent in range(100):
        run.marks["m", "beast"] = percent
        run.at(percent * 100.0)
        assert run.said(percent * 100.0 + 99) == []


def test_a_load_that_shows_no_change_stands_still() -> None:
    run = loading()
    run.marks["m", "beast"] = 43
    run.at(10.0)
    assert run.said(10 + STILL_S - 1) == []
    assert run.said(10 + STILL_S) == ["loading m on beast has made no progress for 120 s"]


def test_a_node_that_does_not_tell_how_far_it_is_has_longer() -> None:
    run = loading()
    assert run.said(UNTOLD_STILL_S - 1) == []
    assert run.said(UNTOLD_STILL_S) == ["loading m on beast has made no progress for 600 s"]


def test_room_that_does_not_come_is_told() -> None:
    run = Run()
    run.at(0.0, Asked("m", 1, 10_000.0), Placed("m", "beast", ("old",)))
    assert run.said(STILL_S - 1) == []
    assert run.said(STILL_S) == ["room for m on beast has not come for 120 s"]


@pytest.mark.parametrize("other_loads", [False, True])
def test_requests_that_wait_for_a_place_are_told_where_nothing_moves(other_loads: bool) -> None:
    run = Run()
    blocked = (Failure("beast", Kind.NO_ROOM, "all in use"),)
    run.at(0.0, Asked("m", 1, 10_000.0), NoPlace("m", 1.0, blocked))
    for second in range(1, int(STILL_S)):  # it looks again and again, and finds nothing
        run.at(float(second), Tick(), NoPlace("m", second + 1.0, blocked))
    if other_loads:
        run.at(STILL_S - 1, Asked("other", 2, 10_000.0), Placed("other", "benjy"))
    told = ["1 requests have waited for m for 120 s, though nothing loads or drains (beast: all in use)"]
    assert run.said(STILL_S) == ([] if other_loads else told)


def test_what_is_over_is_forgotten() -> None:
    run = loading()
    run.at(5.0, swapper.Ended("m", "beast", None))
    assert run.said(10_000.0) == []
    run.at(10_000.0, Asked("m", 2, 20_000.0), Placed("m", "beast"))
    assert run.said(10_001.0) == []
