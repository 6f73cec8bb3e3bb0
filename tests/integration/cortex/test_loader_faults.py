"""The loader against neurons that refuse, fail, hang and die."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import gateway, refused

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import Conflict, LoadFailed, ModelNotServable, NoNode, ShuttingDown


def test_a_refusal_for_want_of_room_teaches_the_need_and_sends_the_load_to_another() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=9000), FakeNeuron(memory_mb=6000)
        for fake, need in ((a, 20_000), (b, 5000)):
            fake.needs_mb["qwen"] = need
            fake.answers["/models/estimate"] = (404, b"{}")
        async with gateway([ModelProfile(id="qwen")], a=a, b=b) as gate:
            await gate.loader.ensure("qwen", 1)
            assert len(a.loads) == len(b.loads) == 1
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


def test_a_load_that_fails_on_one_node_is_tried_on_the_next_and_then_everybody_gets_every_reason() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        a.load_failure = b.load_failure = "the host died: out of memory"
        async with gateway(a=a, b=b) as gate:
            error = await refused(gate)
            assert isinstance(error, LoadFailed)
            assert "a: the host died" in error.message
            assert "b: the host died" in error.message
            assert error.retry_after_s is not None
            assert 5 <= error.retry_after_s <= 10
            assert isinstance(await refused(gate), LoadFailed)
            assert len(a.loads) == len(b.loads) == 1, "a model that failed lately is not tried again at once"
            b.load_failure = None
            await gate.loader.load("qwen", "b")
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


def test_what_can_never_load_anywhere_is_refused_for_good_with_each_nodes_reason() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_errors["qwen"] = (422, {"code": "load_impossible", "message": "the file is truncated"})
        async with gateway(a=a) as gate:
            error = await refused(gate)
            assert isinstance(error, ModelNotServable)
            assert "a: the file is truncated" in error.message
            assert isinstance(await refused(gate), ModelNotServable)
            assert len(a.loads) == 1

    run(main())


def test_a_node_that_dies_in_the_load_leaves_it_to_another() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=5000), FakeNeuron(memory_mb=9000)
        a.load_may_end.clear()
        async with gateway(a=a, b=b) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            await a.die()
            await waiting
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


def test_with_the_only_node_dead_in_the_load_the_request_ends_and_says_so() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            waiting = asyncio.create_task(refused(gate))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            await a.die()
            error = await waiting
            assert isinstance(error, NoNode)
            assert "a: died during the load" in error.message

    run(main())


def test_a_node_that_restarts_in_the_load_is_not_waited_for_in_vain() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a, interval_s=5) as gate:
            waiting = asyncio.create_task(refused(gate))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            await a.die()
            await a.start()
            assert isinstance(await waiting, LoadFailed | NoNode)

    run(main())


def test_a_node_that_never_answers_the_order_is_given_up_with_its_polls() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=9000), FakeNeuron(memory_mb=5000)
        async with gateway(a=a, b=b) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            a.hanging.add("*")
            await waiting
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]
            assert gate.fleet.nodes["a"].state in ("suspect", "down")

    run(main())


def test_with_no_node_alive_the_answer_comes_at_once() -> None:
    async def main() -> None:
        a = FakeNeuron()
        async with gateway(a=a) as gate:
            await a.die()
            await until(gate.fleet, lambda: gate.fleet.nodes["a"].state == "down")
            error = await refused(gate)
            assert isinstance(error, NoNode)
            assert "a is down" in error.message

    run(main())


def test_recovery_that_is_given_up_goes_to_the_next_node() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        a.put("qwen", "recovering")
        async with gateway(a=a, b=b) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await asyncio.sleep(0)  # it waits for a's recovery now
            assert gate.loader.progress("qwen") == b"recovering qwen on a"
            if not a.is_listened_to:
                await a.until_asked("/events")
            a.put("qwen", "failed", error="it died three times")
            await waiting
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


def test_loaded_with_another_profile_is_good_enough_for_a_request_and_told_to_an_operator() -> None:
    async def main() -> None:
        a = FakeNeuron(events=False)
        a.load_errors["qwen"] = (409, {"code": "loaded_differently", "message": "loaded with context 512"})
        async with gateway(a=a, interval_s=60) as gate:
            a.put("qwen", "loaded")
            await gate.loader.ensure("qwen", 1)
            with pytest.raises(Conflict, match="loaded with context 512") as caught:
                await gate.loader.load("qwen", "a")
            assert caught.value.code == "loaded_differently"

    run(main())


def test_a_busy_node_is_waited_for() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_errors["qwen"] = (503, {"code": "model_unloading", "message": "qwen is unloading"})
        async with gateway(a=a) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/load")
            a.load_errors.clear()
            await waiting
            assert len(a.loads) == 2

    run(main())


def test_at_the_end_whoever_waits_is_told() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            waiting = asyncio.create_task(refused(gate))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            await gate.loader.stop()
            assert isinstance(await waiting, ShuttingDown)
            assert isinstance(await refused(gate), ShuttingDown)

    run(main())
