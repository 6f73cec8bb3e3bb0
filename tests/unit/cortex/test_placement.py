from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.core.lifecycle import ModelStatus
from helexa.cortex import eviction, placement
from helexa.cortex.eviction import POLICIES, Resident
from helexa.cortex.plans import Bar, DeviceView, Need, NodeView, NoPlan, Plan, Reason, Wanted

NOW = 100_000.0
LRU = POLICIES["lru"]


def device(index: int, total: int, free: int | None, **facts: Any) -> DeviceView:
    return DeviceView(index=index, total_mb=total, free_mb=free, **facts)


def node(name: str, *devices: DeviceView, held: tuple[Resident, ...] = (), **facts: Any) -> NodeView:
    return NodeView(name=name, devices=devices, residents=held, **facts)


def resident(model: str, memory: dict[int, int], idle_s: float = 60.0, **facts: Any) -> Resident:
    return Resident(model=model, memory_mb=memory, last_used=NOW - idle_s, uses=1.0, uses_at=NOW - idle_s, **facts)


def wanted(mb: int = 8000, **facts: Any) -> Wanted:
    return Wanted("m", Need((mb,), "vram_mb"), **facts)


def planned(nodes: list[NodeView], what: Wanted, **options: Any) -> Plan:
    found = placement.plan(nodes, what, LRU, NOW, **options)
    assert isinstance(found, Plan), str(found)
    return found


def refused(nodes: list[NodeView], what: Wanted, policy: str = "lru") -> NoPlan:
    found = placement.plan(nodes, what, POLICIES[policy], NOW)
    assert isinstance(found, NoPlan)
    return found


def test_the_fullest_device_that_has_room_is_taken() -> None:
    nodes = [node("big", device(0, 48_000, 48_000)), node("small", device(0, 24_000, 20_000), device(1, 24_000, 9_000))]
    found = planned(nodes, wanted())
    assert (found.node, found.devices, found.parts_mb, found.victims) == ("small", (1,), (8000,), ())
    assert (found.price, found.left_mb) == (0.0, 1000)


def test_fit_is_per_device_and_not_of_the_sum() -> None:
    halves = node("halves", device(0, 10_000, 5_000), device(1, 10_000, 5_000))
    assert refused([halves], wanted()).reasons[0].bar is Bar.NOT_NOW
    spread = planned([halves], wanted(min_devices=2))
    assert (spread.devices, spread.parts_mb) == ((0, 1), (4000, 4000))


def test_what_no_device_can_hold_is_spread_in_proportion_to_the_room() -> None:
    found = planned([node("n", device(0, 24_000, 20_000), device(1, 12_000, 12_000))], wanted(30_000))
    assert found.devices == (0, 1)
    assert found.parts_mb == (18_750, 11_250)


def test_tensor_parallel_takes_equal_parts() -> None:
    uneven = node("uneven", device(0, 24_000, 24_000), device(1, 12_000, 9_000))
    assert planned([uneven], wanted(18_000, tensor_parallel=2)).parts_mb == (9000, 9000)
    assert "MB free" in refused([uneven], wanted(19_000, tensor_parallel=2)).reasons[0].text
    assert refused([uneven], wanted(9_000, tensor_parallel=3)).reasons[0].text == "2 devices, and m asks for 3"


def test_ranks_share_the_memory_of_a_node_that_has_only_its_processor() -> None:
    laptop = node("laptop", device(0, 16_000, 9_000), on_cpu=True)
    found = planned([laptop], wanted(8_000, tensor_parallel=2))
    assert (found.devices, found.parts_mb) == ((0,), (8_000,))
    assert "MB free" in refused([laptop], wanted(10_000, tensor_parallel=2)).reasons[0].text


def test_devices_and_shares_of_the_profile_are_kept_to() -> None:
    n = node("n", device(0, 24_000, 24_000), device(1, 24_000, 24_000), device(2, 24_000, 24_000))
    found = planned([n], wanted(9_000, devices=[2, 0], shares=[2.0, 1.0]))
    assert (found.devices, found.parts_mb) == ((0, 2), (3000, 6000))


def test_reservations_and_strangers_count_as_taken() -> None:
    promised = node("promised", device(0, 24_000, 20_000, reserved_mb=13_000))
    assert "13,000 MB are promised" in refused([promised], wanted()).reasons[0].text
    taken = node("taken", device(0, 10_000, 7_800, strangers_mb=2_200))
    reason = refused([taken], wanted(9_000)).reasons[0]
    assert reason.bar is Bar.NOT_NOW
    assert reason.text == (
        "needs 9,000 MB (vram_mb), and has 7,800 MB even when empty; other processes hold 2,200 MB of device 0"
    )


def test_what_victims_of_another_plan_will_free_is_not_given_twice() -> None:
    """A plan for 8,000 MB has been made: 2,000 are free, and the only model there will go for it."""
    held = (resident("going", {0: 6_000}),)
    found = refused([node("n", device(0, 8_000, 2_000, reserved_mb=8_000), held=held)], wanted(6_000))
    assert found.reasons[0].bar is Bar.NOT_NOW


def test_the_node_whose_victims_are_cheapest_is_taken() -> None:
    dear = node("dear", device(0, 8_000, 0), held=(resident("hot", {0: 8000}, idle_s=5),))
    cheap = node("cheap", device(0, 8_000, 0), held=(resident("a", {0: 4000}, 900), resident("b", {0: 4000}, 800)))
    found = planned([dear, cheap], wanted())
    assert (found.node, found.victims) == ("cheap", ("a", "b"))
    assert found.price == pytest.approx(1 / 900 + 1 / 800)


def test_a_suspect_node_and_one_without_the_file_come_last() -> None:
    up = node("up", device(0, 8_000, 0), held=(resident("hot", {0: 8000}, idle_s=5),))
    suspect = node("suspect", device(0, 8_000, 8_000), state="suspect")
    assert planned([suspect, up], wanted()).node == "up"
    empty = node("empty", device(0, 8_000, 8_000))
    assert planned([empty, up], wanted(files_on=frozenset({"up"}))).node == "up"
    assert planned([empty, up], wanted()).node == "empty"


def test_a_measured_need_on_a_node_goes_before_the_general_one() -> None:
    nodes = [node("a", device(0, 8_000, 8_000)), node("b", device(0, 9_500, 9_500))]
    found = planned(nodes, wanted(8_000, need_on={"a": Need((8_100,), "measured")}))
    assert (found.node, found.need.source) == ("b", "vram_mb")


def test_the_estimated_time_counts_the_loads_before_it() -> None:
    n = node("n", device(0, 8_000, 8_000), load_mb_s=1000.0, busy_s=5.0)
    assert planned([n], wanted()).seconds == pytest.approx(13.0)
    assert planned([n], wanted(load_s={"n": 4.0})).seconds == pytest.approx(9.0)
    assert planned([node("n", device(0, 8_000, 8_000))], wanted()).seconds is None


# Refusals


def test_what_can_never_fit_is_told_from_what_cannot_now() -> None:
    small = node("small", device(0, 6_000, 6_000))
    assert refused([small], wanted()).is_never
    busy = node("busy", device(0, 8_000, 0), held=(resident("talking", {0: 8000}, in_use=3),))
    found = refused([small, busy], wanted())
    assert not found.is_never
    assert str(found) == (
        "small: needs 8,000 MB (vram_mb), and has 6,000 MB even when empty; "
        "busy: needs 8,000 MB and has 0 MB free; talking is in use (3 requests)"
    )


def test_pins_that_stand_in_the_way_are_named() -> None:
    held = (resident("flagship", {0: 5000}, pinned=True), resident("other", {0: 3000}))
    found = refused([node("n", device(0, 10_000, 2_000), held=held)], wanted())
    assert found.is_never
    assert found.pins == ("flagship",)
    assert found.reasons[0].text == "needs 8,000 MB, and what is pinned there leaves too little: flagship (5,000 MB)"


def test_too_few_and_too_small_devices_are_told_in_words() -> None:
    beast = node("beast", device(0, 12_000, 12_000), device(1, 12_000, 7_800, strangers_mb=4_200))
    what = wanted(19_000, min_devices=2, min_device_vram_mb=10_000)
    found = refused([beast], what)
    assert str(found) == (
        "beast: 2 devices, but device 1 has 7,800 of 10,000 MB even when empty; "
        "other processes hold 4,200 MB of device 1"
    )
    assert not found.is_never
    assert str(refused([node("one", device(0, 24_000, 24_000))], what)) == "one: 1 device, and m asks for 2"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"pinned": True}, "what is pinned there leaves too little"),
        ({"in_use": 1}, "is in use (1 request)"),
        ({"queued": 2}, "is in use (2 requests)"),
        ({"state": ModelStatus.UNLOADING}, "is unloading"),
        ({"loaded_at": NOW - 2, "min_residency_s": 6.0}, "has just been loaded, and may go in 4 s"),
        ({"priority": 1}, "has a higher residency_priority"),
    ],
)
def test_each_thing_that_keeps_a_model_is_said(facts: dict[str, Any], words: str) -> None:
    full = node("n", device(0, 8_000, 0), held=(resident("held", {0: 8000}, **facts),))
    assert words in refused([full], wanted(), "priority").reasons[0].text


def test_it_is_known_when_a_young_model_may_go() -> None:
    young = resident("young", {0: 8000}, loaded_at=NOW - 2, min_residency_s=6.0)
    assert refused([node("n", device(0, 8_000, 0), held=(young,))], wanted()).again_at == NOW + 4


def test_a_node_that_is_away_avoided_or_has_it_is_not_called_too_small() -> None:
    room = device(0, 24_000, 24_000)
    nodes = [
        node("down", room, state="down"),
        node("draining", room, state="draining"),
        node("failed", room),
        node("has", room, held=(resident("m", {0: 1}),)),
        node("elsewhere", room),
    ]
    found = refused(
        nodes, wanted(avoid={"failed": "a load failed 10 s ago"}, pinned_on=["down", "draining", "failed", "has"])
    )
    assert [r.bar for r in found.reasons] == [Bar.AWAY, Bar.AWAY, Bar.AWAY, Bar.AWAY, Bar.NEVER]
    assert not found.is_never
    assert "a load failed 10 s ago" in str(found)


def test_unknown_memory_is_no_zero_and_no_room() -> None:
    blind = node("blind", DeviceView(index=0, total_mb=None, free_mb=None))
    assert refused([blind], wanted()).reasons[0] == Reason("blind", Bar.AWAY, "its memory is not known")
    lame = node("lame", device(0, 8_000, 8_000))
    assert not refused([lame], Wanted("m", None)).is_never


def test_models_in_use_are_drained_only_where_that_is_allowed() -> None:
    held = (resident("talking", {0: 8000}, in_use=1),)
    found = planned([node("n", device(0, 8_000, 0), held=held)], wanted(), drain=True)
    assert found.victims == found.drains == ("talking",)


# Properties


@st.composite
def fleets(draw: st.DrawFn) -> list[NodeView]:
    nodes = []
    for at in range(draw(st.integers(0, 7))):
        free: list[int] = []
        held: list[Resident] = []
        totals = draw(st.lists(st.sampled_from([6_000, 12_000, 24_000]), min_size=1, max_size=3))
        for index, total in enumerate(totals):
            left = total
            for _ in range(draw(st.integers(0, 3))):
                mb = draw(st.sampled_from([1_000, 2_500, 4_000, 9_000]))
                if mb > left:
                    continue
                left -= mb
                held.append(
                    Resident(
                        model="m" if draw(st.integers(0, 30)) == 0 else f"{at}.{len(held)}",
                        memory_mb={index: mb},
                        in_use=draw(st.sampled_from([0, 0, 0, 1])),
                        pinned=draw(st.sampled_from([False, False, False, True])),
                        last_used=NOW - draw(st.sampled_from([1.0, 10.0, 100.0, 1000.0])),
                        uses=draw(st.floats(0, 100)),
                        uses_at=NOW,
                        loaded_at=draw(st.sampled_from([0.0, NOW - 5])),
                        min_residency_s=draw(st.sampled_from([0.0, 10.0])),
                        priority=draw(st.integers(0, 2)),
                        copies=draw(st.sampled_from([1, 1, 1, 2])),
                    )
                )
            free.append(left)
        nodes.append(
            NodeView(
                name=f"n{at}",
                devices=[
                    # now and then less is free than models and strangers explain, or more is held than there is
                    device(
                        i,
                        t,
                        max(0, f - draw(st.sampled_from([0, 0, 900]))),
                        strangers_mb=draw(st.sampled_from([0, 0, 500])),
                        reserved_mb=draw(st.sampled_from([0, 0, 0, 2_000])),
                    )
                    for i, (t, f) in enumerate(zip(totals, free, strict=True))
                ],
                residents=held,
                state=draw(st.sampled_from(["up", "up", "up", "suspect", "down"])),
            )
        )
    return nodes


wants = st.builds(
    wanted,
    mb=st.integers(500, 30_000),
    min_devices=st.sampled_from([1, 1, 2]),
    tensor_parallel=st.sampled_from([1, 1, 2]),
    min_device_vram_mb=st.sampled_from([0, 0, 10_000]),
    priority=st.integers(0, 2),
    files_on=st.sampled_from([None, None, frozenset({"n0", "n3"})]),
    avoid=st.sampled_from([{}, {}, {"n1": "failed"}]),
    pinned_on=st.sampled_from([[], [], ["n0", "n1", "n2"]]),
    devices=st.sampled_from([None, None, None, [0], [1, 0]]),
    need_on=st.sampled_from([{}, {"n2": Need((3_000,), "measured")}]),
)
policies = st.sampled_from(list(POLICIES.values()))


@settings(max_examples=150)
@given(fleets(), wants, policies, st.booleans())
def test_the_ordered_search_gives_the_exhaustive_answer(
    nodes: list[NodeView], what: Wanted, policy: eviction.Policy, drain: bool
) -> None:
    found = placement.plan(nodes, what, policy, NOW, drain=drain)
    every = placement.weigh(nodes, what, policy, NOW, drain=drain)
    best = every[0] if every else None
    if isinstance(found, NoPlan):
        assert list(found.reasons) == every
        assert all(isinstance(reason, Reason) for reason in every)
    else:
        assert isinstance(best, Plan)
        assert (found.order, found.victims, found.devices) == (best.order, best.victims, best.devices)
        assert found.weighed <= len(nodes)


@settings(max_examples=150)
@given(fleets(), wants, policies)
def test_a_plan_never_commits_more_than_there_is_nor_takes_what_must_stay(
    nodes: list[NodeView], what: Wanted, policy: eviction.Policy
) -> None:
    found = placement.plan(nodes, what, policy, NOW)
    if isinstance(found, NoPlan):
        assert len(found.reasons) == len(nodes)
        return
    where = next(n for n in nodes if n.name == found.node)
    gone = [r for r in where.residents if r.model in found.victims]
    assert len(gone) == len(found.victims)
    assert not any(r.pinned or r.in_use or NOW - r.loaded_at < r.min_residency_s for r in gone)
    assert sum(found.parts_mb) >= found.need.total_mb
    for index, part in zip(found.devices, found.parts_mb, strict=True):
        d = where.devices[index]
        assert part <= max(0, (d.free_mb or 0) - d.reserved_mb + sum(r.memory_mb.get(index, 0) for r in gone))
        assert part <= (d.empty_mb if gone else d.room_mb)
        assert d.empty_mb >= what.min_device_vram_mb
    assert len(found.devices) >= max(what.min_devices, what.tensor_parallel)
    assert what.devices is None or sorted(what.devices) == list(found.devices)


@given(fleets(), wants, policies, st.randoms())
def test_the_order_of_the_nodes_does_not_matter(
    nodes: list[NodeView], what: Wanted, policy: eviction.Policy, rng: Any
) -> None:
    shuffled = rng.sample(nodes, len(nodes))
    found, again = (placement.plan(n, what, policy, NOW) for n in (nodes, shuffled))
    assert (isinstance(found, Plan) and found.order) == (isinstance(again, Plan) and again.order)
