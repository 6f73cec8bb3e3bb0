"""What goes when a model needs room, against neurons that refuse, drain and die over it."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import QWEN, Gateway, gateway

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Eviction, Loading
from helexa.core.errors import Conflict, LoadFailed, Overloaded
from helexa.cortex.eviction import BASE_MB


def holding(*models: str, mb: int = 4000, memory_mb: int = 10_000) -> FakeNeuron:
    node = FakeNeuron(memory_mb=memory_mb)
    for model in models:
        node.put(model, "loaded", tell=False, vram_used_mb=mb)
    return node


def used(gate: Gateway, model: str, *, times: int, ago_s: float) -> None:
    """It had so many requests, the last one so long ago."""
    at = time.monotonic() - ago_s
    [replica] = gate.fleet.replicas(model)
    for _ in range(times):
        replica.begin(at)
        replica.end(at)


@pytest.mark.parametrize(("strategy", "goes"), [("lru", "often"), ("adaptive", "once")])
def test_the_strategy_says_which_idle_model_makes_room(strategy: str, goes: str) -> None:
    async def main() -> None:
        a = holding("often", "once")
        async with gateway(eviction=Eviction(strategy=strategy), a=a) as gate:  # type: ignore[arg-type]
            used(gate, "often", times=50, ago_s=20)
            used(gate, "once", times=1, ago_s=10)
            await gate.loader.ensure("qwen", 1)
            assert [order.id for order in a.unloads] == [goes]

    run(main())


def test_with_classes_a_model_of_a_higher_one_is_never_displaced_and_displaces_those_below() -> None:
    async def main() -> None:
        a = holding("low", "high")
        models = [QWEN, ModelProfile(id="high", residency_priority=5)]
        waits = Loading(wait_s=0.4)
        async with gateway(models, eviction=Eviction(strategy="priority"), loading=waits, a=a) as gate:
            used(gate, "low", times=50, ago_s=1)
            used(gate, "high", times=1, ago_s=100)
            await gate.loader.ensure("qwen", 1)
            assert [order.id for order in a.unloads] == ["low"]
            gate.fleet.profiles["wide"] = ModelProfile(id="wide", vram_mb=8000)
            with pytest.raises(Overloaded, match="high has a higher residency_priority"):
                await gate.loader.ensure("wide", 2)

    run(main())


def test_no_more_goes_than_is_needed() -> None:
    async def main() -> None:
        a = holding("x", "y", "z", mb=3000, memory_mb=9000)
        async with gateway([ModelProfile(id="m", vram_mb=3000)], a=a) as gate:
            a.needs_mb["m"] = 3000
            await gate.loader.ensure("m", 1)
            assert len(a.unloads) == 1
            assert sum(info.status == "loaded" for info in a.models.values()) == 3

    run(main())


def test_a_victim_that_is_in_use_again_stays_and_another_goes() -> None:
    async def main() -> None:
        a = holding("x", "y")
        async with gateway(a=a, interval_s=60) as gate:
            used(gate, "x", times=1, ago_s=100)
            used(gate, "y", times=9, ago_s=1)
            a.put("x", "loaded", tell=False, vram_used_mb=4000, active_requests=1)  # another gateway's
            await gate.loader.ensure("qwen", 1)
            assert [order.id for order in a.unloads] == ["x", "y"]
            assert gate.told("x", "a") == "loaded"

    run(main())


def test_a_node_that_could_never_load_it_evicts_nothing_for_it() -> None:
    async def main() -> None:
        a, b = holding("x", "y"), FakeNeuron(memory_mb=9000)
        a.answers["/models/estimate"] = (422, b'{"error": {"code": "file_not_whole", "message": "it is cut short"}}')
        b.put("busy", "loaded", vram_used_mb=5000, active_requests=1)
        async with gateway(a=a, b=b, interval_s=0.2) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/estimate", 1)
            b.put("busy", "unloaded")
            await waiting
            assert gate.where("qwen") == ["b"]
            assert a.unloads == []

    run(main())


def test_what_is_in_use_has_to_finish_and_go_once_another_has_waited_long_enough() -> None:
    async def main() -> None:
        a = holding("x", mb=9000)
        async with gateway(options={"drain_after_s": 0.3}, a=a) as gate:
            a.put("x", "loaded", vram_used_mb=9000, active_requests=1)
            await until(gate.fleet, lambda: gate.fleet.replicas("x")[0].others == 1)
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await until(gate.fleet, lambda: gate.told("x", "a") == "unloading")
            assert gate.loader.progress("qwen") == b"making room for qwen on a"
            assert not gate.fleet.replicas("x"), "nothing new goes to it meanwhile"
            a.models["x"].active_requests = 0
            await waiting
            assert [order.drain_s for order in a.unloads] == [30]
            assert gate.where("qwen") == ["a"]

    run(main())


def test_a_model_that_becomes_idle_makes_room_at_once() -> None:
    async def main() -> None:
        a = holding("x", mb=9000)
        async with gateway(a=a, interval_s=60) as gate:
            gate.requests("x")
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await asyncio.sleep(0.1)
            assert a.unloads == []
            began = time.monotonic()
            [replica] = gate.fleet.replicas("x")
            replica.end(time.monotonic())
            await waiting
            assert time.monotonic() - began < 0.5

    run(main())


def test_a_node_that_dies_while_it_drains_leaves_the_load_to_another() -> None:
    async def main() -> None:
        a, b = holding("x", mb=9000), FakeNeuron(memory_mb=9000)
        b.put("busy", "loaded", vram_used_mb=5000, active_requests=1)
        async with gateway(a=a, b=b, interval_s=0.2) as gate:
            a.hanging.add("/models/unload")
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/unload")
            await a.die()
            b.put("busy", "unloaded")
            await waiting
            assert gate.where("qwen") == ["b"]

    run(main())


def test_room_that_was_promised_is_not_planned_twice() -> None:
    async def main() -> None:
        a = FakeNeuron(memory_mb=10_000)
        a.load_may_end.clear()
        models = [ModelProfile(id=f"m{i}", vram_mb=4000) for i in range(4)]
        for model in models:
            a.needs_mb[model.id] = 4000
        async with gateway(models, a=a, interval_s=60, loading=Loading(wait_s=1)) as gate:
            waiting = [asyncio.create_task(gate.loader.ensure(m.id, m.id)) for m in models]
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert len(a.loads) == 2, "the others wait, and are not sent to be refused"
            assert all(isinstance(o, Exception) for o in outcomes)

    run(main())


def test_an_operators_load_on_a_node_takes_the_place_of_what_is_idle_there() -> None:
    async def main() -> None:
        a, b = holding("x", mb=9000), FakeNeuron(memory_mb=50_000)
        async with gateway(a=a, b=b) as gate:
            a.needs_mb |= {"qwen": 5000, "x": 9000}
            await gate.loader.load("qwen", "a")
            assert gate.where("qwen") == ["a"]
            gate.requests("qwen")
            with pytest.raises(Conflict, match="needs 9000 MB"):
                await gate.loader.load("x", "a")

    run(main())


def test_a_load_that_ran_out_of_memory_evicts_one_more_and_is_tried_once_again() -> None:
    async def main() -> None:
        a = holding("x", "y", mb=4000, memory_mb=10_000)
        a.needs_mb["qwen"], a.really_needs_mb["qwen"] = 5000, 9000
        async with gateway(a=a) as gate:
            used(gate, "x", times=1, ago_s=9)
            await gate.loader.ensure("qwen", 1)
            assert sorted(order.id for order in a.unloads) == ["x", "y"]
            assert len(a.loads) == 2
            await gate.loader.unload("qwen")
            a.put("z", "loaded", vram_used_mb=4000)
            # without it the memory would be told with the next poll, after the model
            a.publish(
                "device", {"index": 0, "vram_used_mb": 4000, "vram_free_mb": 6000}
            )  # may be told with a poll only
            await until(gate.fleet, lambda: (gate.told("z", "a"), gate.fleet.nodes["a"].free_mb) == ("loaded", 6000))
            await gate.loader.ensure("qwen", 2)
            assert [order.id for order in a.unloads][3:] == ["z"], "the lesson is kept"
            assert len(a.loads) == 3

    run(main())


def test_a_load_that_always_runs_out_of_memory_is_told_after_two_tries() -> None:
    async def main() -> None:
        a = FakeNeuron(memory_mb=10_000)
        a.needs_mb["qwen"], a.really_needs_mb["qwen"] = 5000, 20_000
        async with gateway(a=a) as gate:
            with pytest.raises(LoadFailed, match="a: no more memory"):
                await gate.loader.ensure("qwen", 1)
            assert len(a.loads) == 2

    run(main())


# what is told of it afterwards


def test_an_eviction_and_its_load_are_told_with_what_else_was_weighed() -> None:
    async def main() -> None:
        a, b, c = holding("cold"), holding("warm"), holding("big", mb=900, memory_mb=1000)
        models = [QWEN, ModelProfile(id="big", pinned_on=["c"])]
        a.models["cold"].vram_used_mb = b.models["warm"].vram_used_mb = 8000
        async with gateway(models, a=a, b=b, c=c) as gate:
            used(gate, "cold", times=1, ago_s=100)
            used(gate, "warm", times=9, ago_s=10)
            await gate.loader.ensure("qwen", 1, request_id="req-1")
            load, evict = gate.loader.decisions.last()
        assert (evict.what, evict.model, evict.node, evict.wanted) == ("evict", "cold", "a", "qwen")
        assert (evict.by, evict.requests, evict.waiting) == ("request", ("req-1",), 1)
        assert evict.price == pytest.approx((1 * (8000 + BASE_MB) / 100) ** 0.25, rel=0.05)
        assert "on a cold would have to go for it" in evict.why
        assert [w.node for w in evict.weighed] == ["a", "b", "c"]
        assert evict.weighed[1].victims == ("warm",)
        assert evict.weighed[1].price == pytest.approx((9 * (8000 + BASE_MB) / 10) ** 0.25, rel=0.05)
        assert "MB even when empty" in (evict.weighed[2].reason or "")
        assert (load.what, load.model, load.node, load.price) == ("load", "qwen", "a", 0.0)
        assert load.requests == ("req-1",)

    run(main())


def test_a_victim_that_stays_a_load_that_fails_and_a_refusal_are_told() -> None:
    async def main() -> None:
        a = holding("used", mb=8000)
        async with gateway(loading=Loading(wait_s=0.5), a=a) as gate:
            used(gate, "used", times=1, ago_s=100)
            a.models["used"].active_requests = 1  # which the gateway does not know yet
            with pytest.raises(Overloaded):
                await gate.loader.ensure("qwen", 1)
            told = {d.what: d for d in gate.loader.decisions.last()}
            assert (told["stays"].model, told["stays"].wanted) == ("used", "qwen")
            assert (told["wait"].model, told["wait"].weighed[0].node) == ("qwen", "a")
            assert "used is in use" in (told["timed_out"].weighed[0].reason or "")
        b = FakeNeuron()
        b.load_failure = "the file is cut short"
        async with gateway(a=b) as gate:
            with pytest.raises(LoadFailed):
                await gate.loader.ensure("qwen", 1)
            refused, failed, *_ = gate.loader.decisions.last()
            assert (failed.what, failed.node, failed.why) == ("load_failed", "a", "the file is cut short")
            assert (refused.what, refused.weighed[0].reason) == ("refuse", "the file is cut short")
            assert "could not be loaded" in refused.why

    run(main())


def test_an_operators_words_are_told_as_his() -> None:
    async def main() -> None:
        a = holding("old", mb=8000)
        async with gateway(a=a) as gate:
            used(gate, "old", times=1, ago_s=100)
            await gate.loader.load("qwen", "a")
            await gate.loader.unload("qwen")
            told = [(d.what, d.model, d.node, d.by) for d in gate.loader.decisions.last()]
            assert told == [
                ("unload", "qwen", "a", "operator"),
                ("load", "qwen", "a", "operator"),
                ("evict", "old", "a", "operator"),
            ]

    run(main())
