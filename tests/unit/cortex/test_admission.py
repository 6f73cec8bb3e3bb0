from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.fleets import answers, fleet, info

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Bounds
from helexa.core.errors import Overloaded
from helexa.core.lifecycle import ModelLimits
from helexa.cortex.admission import Admission, Load, load_of, takes_one
from helexa.cortex.nodes import Replica

COUNTS = st.none() | st.integers(0, 5)


@given(COUNTS, COUNTS, st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_no_bound_is_passed_and_nothing_is_refused_below_it(
    running: int | None, waiting: int | None, runs: int, waits: int, queues: bool
) -> None:
    taken = takes_one(Bounds(running=running, waiting=waiting), Load(runs, waits), queues=queues)
    over = (running is not None and runs + 1 > running) or (queues and waiting is not None and waits + 1 > waiting)
    assert taken is not over


def admission(bounds: Bounds | None = None, *, queue: int = 256, now: float = 10.0) -> tuple[Admission, Replica]:
    view = fleet("beast", models=[ModelProfile(id="m", limits=bounds)])
    answers(view, "beast", info("m", limits=ModelLimits(slots=2)))
    [replica] = view.replicas("m")
    return Admission(view, queue, lambda: now), replica


def test_what_a_node_has_beyond_its_slots_waits_there() -> None:
    _, replica = admission()
    for _ in range(5):
        replica.begin(1.0)
    assert load_of([replica], here=2) == Load(running=5, waiting=5)


def test_a_model_takes_as_many_as_its_bound_says_and_no_more_may_wait_than_that_says() -> None:
    bounded, replica = admission(Bounds(running=1, waiting=2))
    assert bounded.takes("m")
    replica.begin(1.0)
    assert not bounded.takes("m")
    turns = [bounded.enter("m", client) for client in "ab"]
    with pytest.raises(Overloaded, match="2 requests wait for m already, and 2 may"):
        bounded.enter("m", "c")
    assert bounded.enter("m", "c", has_waited=True).model_id == "m"  # whoever waited for the load has had its turn
    assert [bounded.is_first(turn) for turn in turns] == [True, False]


def test_a_client_may_not_fill_the_line() -> None:
    bounded, replica = admission(Bounds(running=1), queue=9)
    replica.begin(1.0)
    for _ in range(6):
        bounded.enter("m", "a")
    with pytest.raises(Overloaded, match="6 of the 6 requests that wait for m are of this client"):
        bounded.enter("m", "a")
    assert bounded.enter("m", "b")


def test_who_is_refused_comes_again_when_those_who_wait_will_have_been_served() -> None:
    bounded, replica = admission(Bounds(running=1, waiting=3))
    for at in (2.0, 4.0, 6.0, 8.0):
        replica.begin(at - 2)
        replica.end(at)
    replica.begin(8.0)
    for client in "abc":
        bounded.enter("m", client)
    with pytest.raises(Overloaded) as caught:
        bounded.enter("m", "d")
    assert caught.value.retry_after_s == 6  # 3 wait; 4 ended in the last 8 s


def test_whose_turn_it_is_hears_of_a_place_and_then_the_next() -> None:
    bounded, replica = admission(Bounds(running=1))
    replica.begin(1.0)
    first, second, third = (bounded.enter("m", client) for client in "aab")
    bounded.changed()
    assert (first.news.is_set(), second.news.is_set(), third.news.is_set()) == (True, False, False)
    bounded.leave(first, served=True)
    assert bounded.is_first(third)  # its client has not been served yet
    assert third.news.is_set()
    bounded.leave(third, served=False)
    bounded.leave(second, served=True)
    assert bounded.lines == {}


def test_a_node_with_a_bound_counts_all_its_models_and_is_passed_over_once_it_is_full() -> None:
    view = fleet("beast", models=[ModelProfile(id="m"), ModelProfile(id="n")])
    view.nodes["beast"].bounds = Bounds(running=3, waiting=1)
    answers(view, "beast", info("m", limits=ModelLimits(slots=1)), info("n", limits=ModelLimits(slots=1)))
    bounded = Admission(view, 8, lambda: 0.0)
    [m], [n] = view.replicas("m"), view.replicas("n")
    m.begin(1.0)
    assert bounded.full_nodes("m") == []
    m.begin(1.0)  # waits at the node
    assert bounded.full_nodes("m") == ["beast"]
    assert bounded.full_nodes("n") == []
    n.begin(1.0)
    assert bounded.full_nodes("n") == ["beast"]
