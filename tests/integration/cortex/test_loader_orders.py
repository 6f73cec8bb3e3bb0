"""An operator's orders: a load on the node that is named, and an unload."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import gateway

from helexa.core.errors import BadRequest, Conflict, LoadFailed, NoNode


def test_an_unload_stops_routing_at_once_and_is_undone_where_the_node_refuses() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.put("qwen", "loaded", active_requests=3)
        async with gateway(a=a) as gate:
            unloading = asyncio.create_task(gate.loader.unload("qwen"))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "unloading")
            assert gate.fleet.replicas("qwen") == []
            with pytest.raises(Conflict) as caught:
                await unloading
            assert caught.value.code == "model_in_use"
            assert caught.value.details == {"active_requests": 3}
            assert len(gate.fleet.replicas("qwen")) == 1
            await gate.loader.unload("qwen", force=True)
            assert gate.fleet.replicas("qwen") == []
            assert gate.told("qwen", "a") == "unloaded"
            await gate.loader.unload("qwen")  # nothing to do

    run(main())


def test_an_unload_that_nobody_answers_leaves_the_view_as_it_was() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.put("qwen", "loaded")
        async with gateway(a=a, interval_s=60) as gate:
            await a.die()
            with pytest.raises(NoNode):
                await gate.loader.unload("qwen")
            assert gate.told("qwen", "a") == "loaded"

    run(main())


def test_an_operator_loads_on_the_node_he_names_and_is_told_what_is_wrong_with_it() -> None:
    async def main() -> None:
        a, b, dead = FakeNeuron(memory_mb=50_000), FakeNeuron(memory_mb=500), FakeNeuron()
        b.needs_mb["big"] = 900
        async with gateway(a=a, b=b, dead=dead) as gate:
            await gate.loader.load("qwen", "b")
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]
            with pytest.raises(Conflict) as caught:
                await gate.loader.load("big", "b")
            assert (caught.value.code, caught.value.details) == (
                "insufficient_memory",
                {"need_mb": 900, "free_mb": 400},
            )
            with pytest.raises(BadRequest, match="no node is called 'bb'; known: b"):
                await gate.loader.load("qwen", "bb")
            await dead.die()
            await until(gate.fleet, lambda: gate.fleet.nodes["dead"].state == "down")
            with pytest.raises(NoNode, match="dead is down"):
                await gate.loader.load("qwen", "dead")

    run(main())


def test_an_operator_may_load_what_nobody_has_configured() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron(memory_mb=50_000)
        b.load_errors["org/new:Q4_0"] = (404, {"code": "model_not_found", "message": "downloads are not allowed"})
        async with gateway(a=a, b=b) as gate:
            await gate.loader.load("org/new:Q4_0")
            assert [r.node.name for r in gate.fleet.replicas("org/new:Q4_0")] == ["a"]
            for fake in (a, b):
                fake.load_errors["org/x"] = (500, {"code": "load_failed", "message": "no such file"})
            with pytest.raises(LoadFailed, match="no such file"):
                await gate.loader.load("org/x")

    run(main())
