from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.fleets import answers, fleet, info

from helexa.core.errors import LoadFailed
from helexa.core.lifecycle import ModelLimits
from helexa.cortex.fallbacks import Fallbacks, Outlook, first_in_time, loaded
from helexa.cortex.nodes import Replica

OUTLOOKS = st.builds(Outlook, st.none() | st.floats(0, 100), st.booleans())


@given(st.lists(OUTLOOKS, max_size=6), st.floats(-5, 100))
def test_nothing_that_was_passed_over_could_have_served_in_time(outlooks: list[Outlook], left_s: float) -> None:
    chosen = first_in_time(outlooks, left_s)
    if chosen is None:
        assert all(o.is_failing for o in outlooks)
        return
    assert not outlooks[chosen].is_failing
    usable = [o for o in outlooks if not o.is_failing]
    in_time = [o for o in usable if o.wait_s is None or o.wait_s <= left_s]
    if in_time:
        assert outlooks[chosen] is in_time[0]
    else:
        assert outlooks[chosen].wait_s == min(o.wait_s for o in usable if o.wait_s is not None)


def test_nothing_is_looked_up_behind_the_one_that_is_taken() -> None:
    looked: list[str] = []

    def outlooks() -> object:
        for name in ("first", "second"):
            looked.append(name)
            yield Outlook(0.0)

    assert first_in_time(outlooks(), 10) == 0  # type: ignore[arg-type]
    assert looked == ["first"]


@dataclass
class Model:
    id: str
    replicas: list[Replica] = field(default_factory=list)


def test_a_model_that_could_not_be_had_is_passed_over_for_a_while_unless_it_is_loaded_by_now() -> None:
    now = 100.0
    choice = Fallbacks(lambda model_id: Outlook(None), lambda: now)
    big, small = Model("big"), Model("small")
    assert choice.choose([big, small], 60) is big
    choice.failed("big", LoadFailed("no", retry_after_s=10))
    assert choice.choose([big, small], 60) is small
    now = 109.0
    view = fleet("beast")
    answers(view, "beast", info("big"))
    big.replicas = view.replicas("big")
    assert choice.choose([big, small], 60) is big
    big.replicas, now = [], 110.0
    assert choice.choose([big, small], 60) is big


def test_a_loaded_model_is_there_at_once_or_when_those_ahead_have_ended_at_the_pace_they_do() -> None:
    view = fleet("beast")
    answers(view, "beast", info("m", limits=ModelLimits(slots=2)))
    [replica] = view.replicas("m")
    assert loaded([replica], 0.0) == Outlook(0.0)
    for at in (0.0, 0.0):
        replica.begin(at)
    assert loaded([replica], 1.0) == Outlook(None)  # all places taken, and none has ended yet
    for at in (1.0, 2.0, 3.0, 4.0):
        replica.begin(at)
        replica.end(at)
    assert replica.pace(5.0) == 1.0
    assert loaded([replica], 5.0) == Outlook(1.0)


def test_idle_time_does_not_make_a_model_slow() -> None:
    view = fleet("beast")
    answers(view, "beast", info("m"))
    [replica] = view.replicas("m")
    for begin in (10.0, 5000.0, 90_000.0):
        replica.begin(begin)
        replica.end(begin + 2)
    replica.begin(100_000.0)
    assert replica.pace(100_000.0) == 3 / 4
