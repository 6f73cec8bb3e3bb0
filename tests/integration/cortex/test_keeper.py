"""What the gateway does for the fleet though no request waits."""

from __future__ import annotations

import asyncio
import time

from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import QWEN, gateway

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Eviction
from helexa.core.lifecycle import ModelLimits

TWO_SLOTS = ModelLimits(slots=2)


def test_what_was_idle_for_its_ttl_is_unloaded_and_what_is_in_use_is_not() -> None:
    async def main() -> None:
        a = FakeNeuron()
        for model in ("brief", "used", "kept"):
            a.put(model, "loaded", tell=False, vram_used_mb=100)
        models = [ModelProfile(id="brief", ttl_s=0.3), ModelProfile(id="used", ttl_s=0.3), ModelProfile(id="kept")]
        async with gateway(models, keeps=True, a=a) as gate:
            gate.requests("used")
            await until(gate.fleet, lambda: gate.told("brief", "a") == "unloaded")
            await asyncio.sleep(0.3)
            assert [order.id for order in a.unloads] == ["brief"]

    run(main())


def test_what_is_to_be_preloaded_is_loaded_also_when_its_node_comes_later() -> None:
    async def main() -> None:
        a = FakeNeuron()
        models = [ModelProfile(id="wanted", preload=True, vram_mb=100), QWEN]
        async with gateway(models, a=a) as gate:
            await a.die()
            await until(gate.fleet, lambda: gate.fleet.nodes["a"].state == "down")
            gate.loader.start()
            await asyncio.sleep(0.2)
            await a.start()
            await until(gate.fleet, lambda: gate.where("wanted") == ["a"])
            assert [order.id for order in a.loads] == ["wanted"]

    run(main())


def test_a_model_with_four_requests_queued_gets_a_copy_in_free_room_and_gives_it_up_when_idle() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        a.put("qwen", "loaded", vram_used_mb=5000, limits=TWO_SLOTS)
        async with gateway(keeps=True, options={"copy_idle_s": 0.5}, a=a, b=b) as gate:
            gate.requests("qwen", 5)
            await asyncio.sleep(0.3)
            assert b.loads == [], "three in the queue are no reason"
            gate.requests("qwen", 1)
            await until(gate.fleet, lambda: gate.where("qwen") == ["a", "b"])
            b.models["qwen"].load_seconds = 0.1
            [first, _] = gate.fleet.replicas("qwen")
            for _ in range(6):
                first.end(time.monotonic())
            await until(gate.fleet, lambda: gate.where("qwen") == ["a"])
            assert a.unloads == []
            while len(gate.loader.decisions.last()) < 2:  # the node's event comes before its answer
                await asyncio.sleep(0.01)
            told = [(d.what, d.model, d.node, d.by) for d in gate.loader.decisions.last()]
            assert told == [("give_up", "qwen", "b", "upkeep"), ("copy", "qwen", "b", "upkeep")]

    run(main())


def test_no_more_copies_than_max_replicas_and_none_in_place_of_something_for_a_short_queue() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron(memory_mb=8000)
        a.put("qwen", "loaded", vram_used_mb=5000, limits=TWO_SLOTS)
        a.put("one", "loaded", vram_used_mb=100, limits=TWO_SLOTS)
        b.put("cold", "loaded", vram_used_mb=6000)
        async with gateway([QWEN, ModelProfile(id="one", vram_mb=100, max_replicas=1)], keeps=True, a=a, b=b) as gate:
            gate.requests("qwen", 8)
            gate.requests("one", 30)
            await asyncio.sleep(0.4)
            assert b.loads == []
            gate.requests("qwen", 12)  # a queue of eighteen is one for what is cold to go
            await until(gate.fleet, lambda: gate.where("qwen") == ["a", "b"])
            assert [order.id for order in b.unloads] == ["cold"]
            assert [order.id for order in b.loads] == ["qwen"]

    run(main())


def test_a_node_is_asked_to_defragment_after_so_many_loads_and_only_when_it_is_idle() -> None:
    async def main() -> None:
        a = FakeNeuron()
        models = [ModelProfile(id=f"m{i}", vram_mb=100) for i in range(4)]
        async with gateway(models, keeps=True, eviction=Eviction(defrag_after_cycles=2), a=a) as gate:
            await gate.loader.ensure("m0", 1)
            gate.requests("m0")
            await gate.loader.ensure("m1", 2)
            await asyncio.sleep(0.3)
            assert a.asked["/defrag"] == 0
            [replica] = gate.fleet.replicas("m0")
            replica.end(time.monotonic())
            await a.until_asked("/defrag")
            await asyncio.sleep(0.3)
            assert a.asked["/defrag"] == 1

    run(main())


def test_zero_cycles_turn_it_off() -> None:
    async def main() -> None:
        a = FakeNeuron()
        async with gateway(keeps=True, eviction=Eviction(defrag_after_cycles=0), a=a) as gate:
            await gate.loader.ensure("qwen", 1)
            await asyncio.sleep(0.3)
            assert a.asked["/defrag"] == 0

    run(main())
