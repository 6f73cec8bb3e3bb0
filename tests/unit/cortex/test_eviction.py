from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.core.lifecycle import ModelStatus
from helexa.cortex import eviction
from helexa.cortex.eviction import HALF_LIFE_S, POLICIES, Kept, Resident, Usage, min_residency_s

NOW = 100_000.0


def resident(model: str, mb: int = 1000, **facts: Any) -> Resident:
    defaults: dict[str, Any] = {"last_used": NOW - 60, "uses": 1.0, "uses_at": NOW - 60}
    return Resident(model=model, memory_mb={0: mb}, **{**defaults, **facts})


residents = st.lists(
    st.builds(
        Resident,
        model=st.uuids().map(str),
        memory_mb=st.dictionaries(st.sampled_from([0, 1]), st.integers(1, 8000), min_size=1),
        state=st.sampled_from([ModelStatus.LOADED] * 5 + [ModelStatus.LOADING, ModelStatus.UNLOADING]),
        in_use=st.sampled_from([0, 0, 0, 2]),
        queued=st.sampled_from([0, 0, 0, 1]),
        pinned=st.sampled_from([False, False, False, True]),
        last_used=st.floats(0, NOW),
        uses=st.floats(0, 1e4),
        uses_at=st.floats(0, NOW),
        loaded_at=st.sampled_from([0.0, NOW - 5]),
        min_residency_s=st.floats(0, 15),
        priority=st.integers(-2, 2),
        copies=st.sampled_from([1, 1, 2]),
        ttl_s=st.none() | st.floats(1, 1e5),
    ),
    max_size=9,
)
policies = st.sampled_from(list(POLICIES.values()))


def needs_device_0(mb: int, room: int = 0) -> Any:
    return lambda freed: room + freed.get(0, 0) >= mb


def names(victims: list[eviction.Victim] | None) -> list[str]:
    assert victims is not None
    return [v.resident.model for v in victims]


def go(held: list[Resident], mb: int, policy: str = "lru", priority: int = 0) -> list[str]:
    ordered = eviction.candidates(held, POLICIES[policy], priority, NOW)
    return names(eviction.victims(ordered, needs_device_0(mb)))


def test_lru_lets_the_longest_idle_go_first() -> None:
    held = [resident("new", last_used=NOW - 1), resident("old", last_used=NOW - 90), resident("mid", last_used=NOW - 9)]
    assert go(held, 1500) == ["old", "mid"]


def test_adaptive_keeps_what_is_asked_for_often_though_it_is_idle_longer() -> None:
    held = [resident("often", uses=400.0, last_used=NOW - 200), resident("once", uses=1.0, last_used=NOW - 50)]
    assert go(held, 500, "adaptive") == ["once"]
    assert go(held, 500, "lru") == ["often"]


def test_a_use_counts_half_after_four_hours() -> None:
    usage = Usage().used(0.0).used(0.0)
    assert usage.at_time(HALF_LIFE_S) == pytest.approx(1.0)
    assert usage.used(2 * HALF_LIFE_S).count == pytest.approx(1.5)


@pytest.mark.parametrize(("load_s", "stays_s"), [(4.0, 2.0), (12.0, 6.0), (300.0, 15.0), (None, 15.0)])
def test_a_model_stays_for_half_of_its_load_but_not_long(load_s: float | None, stays_s: float) -> None:
    assert min_residency_s(load_s) == stays_s


def test_what_turns_out_not_to_be_needed_is_given_back_dearest_first() -> None:
    held = [
        resident("a", 100, last_used=NOW - 900),
        resident("b", 300, last_used=NOW - 800),
        resident("c", 5000, last_used=NOW - 700),
    ]
    assert go(held, 5050) == ["a", "c"]  # b, the dearer of the two, first; then a is needed
    assert go(held, 4000) == ["c"]


def test_a_surplus_copy_goes_before_anything_else() -> None:
    held = [resident("idle", last_used=NOW - 9000), resident("copy", last_used=NOW - 1, uses=1e6, copies=2)]
    for policy in POLICIES:
        assert go(held, 500, policy) == ["copy"]


def test_a_class_displaces_itself_and_those_below_in_both_directions() -> None:
    high, low = resident("high", priority=5, last_used=NOW - 9000), resident("low", priority=1)
    policy = POLICIES["priority"]
    assert go([high, low], 500, "priority", priority=5) == ["low"]
    assert go([high, low], 2000, "priority", priority=5) == ["low", "high"]
    assert go([high, low], 500, "priority", priority=1) == ["low"]
    assert eviction.candidates([high], policy, 1, NOW) == []
    assert eviction.why_kept(high, policy, 1, NOW) is Kept.ABOVE
    assert (
        eviction.why_kept(high, POLICIES["lru"], 1, NOW) is None
    )  # classes are an operator's wish, told by `priority`


def test_in_use_may_go_only_where_it_may_finish_first_and_a_pin_never() -> None:
    policy = POLICIES["lru"]
    busy, pinned = resident("busy", in_use=1), resident("pinned", pinned=True)
    assert eviction.why_kept(busy, policy, 0, NOW) is Kept.IN_USE
    assert eviction.why_kept(busy, policy, 0, NOW, drain=True) is None
    assert eviction.why_kept(pinned, policy, 0, NOW, drain=True) is Kept.PINNED


@given(residents, policies, st.integers(-2, 2), st.integers(1, 30_000))
def test_nobody_goes_who_must_not_and_nobody_who_need_not(
    held: list[Resident], policy: eviction.Policy, priority: int, mb: int
) -> None:
    fits = needs_device_0(mb)
    ordered = eviction.candidates(held, policy, priority, NOW)
    chosen = eviction.victims(ordered, fits)

    def freed(victims: list[eviction.Victim]) -> Mapping[int, int]:
        return {0: sum(v.resident.memory_mb.get(0, 0) for v in victims)}

    if chosen is None:
        assert not fits(freed(ordered))
        return
    assert fits(freed(chosen))
    assert [v for v in ordered if v in chosen] == chosen, "in the order of their scores"
    for victim in chosen:
        r = victim.resident
        assert not r.pinned
        assert not r.is_busy
        assert r.state is ModelStatus.LOADED
        assert NOW - r.loaded_at >= r.min_residency_s
        assert not policy.by_class or r.priority <= priority
        assert not fits(freed([v for v in chosen if v is not victim])), "each of them is needed"


@given(residents, policies)
def test_a_price_grows_with_each_victim(held: list[Resident], policy: eviction.Policy) -> None:
    prices = [policy.price(r, NOW) for r in held]
    for count in range(len(prices)):
        assert eviction.total(prices[:count]) <= eviction.total(prices[: count + 1])


@given(residents)
def test_only_what_is_idle_for_its_ttl_expires(held: list[Resident]) -> None:
    gone = eviction.expired(held, NOW)
    for r in held:
        due = r.ttl_s is not None and NOW - r.last_used >= r.ttl_s and NOW - r.loaded_at >= r.min_residency_s
        assert (r in gone) == (due and not r.pinned and not r.is_busy and r.state is ModelStatus.LOADED)


@pytest.mark.parametrize("name", ["adaptive", "priority"])
def test_of_two_that_are_used_alike_the_smaller_goes_first(name: str) -> None:
    small, large, often = resident("small", 2_000), resident("large", 20_000), resident("often", 2_000, uses=10.0)
    ordered = eviction.candidates([large, often, small], POLICIES[name], 0, NOW)
    assert [victim.resident.model for victim in ordered] == ["small", "large", "often"]  # a load has a fixed part too
