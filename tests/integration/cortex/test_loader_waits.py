"""Who waits for a load: joins it, is told how it stands, leaves, or is told that the wait is over."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import gateway, refused

from helexa.core.config import Loading
from helexa.core.errors import LoadFailed, ModelLoading, Overloaded
from helexa.core.lifecycle import Progress
from helexa.cortex import load_watch
from helexa.cortex.fallbacks import Outlook


def test_where_everything_is_in_use_the_wait_ends_with_what_is_in_the_way() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        for fake, held in ((a, "big"), (b, "huge")):
            fake.put(held, "loaded", vram_used_mb=9000, active_requests=2)
        async with gateway(a=a, b=b, loading=Loading(wait_s=0.4)) as gate:
            errors = await asyncio.gather(*(refused(gate, waiter=i) for i in range(5)))
            assert a.loads == b.loads == []
            assert len({id(e) for e in errors}) == 5
            error = errors[0]
            assert isinstance(error, Overloaded)
            assert "a needs 5,000 MB and has 1,000 MB free; big is in use (2 requests)" in error.message
            assert "huge holds 9,000 MB" in error.message

    run(main())


@pytest.mark.parametrize("status", ["loading", "downloading", "recovering"])
def test_a_load_that_somebody_else_began_is_joined_and_not_begun_again(status: str) -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=100), FakeNeuron(memory_mb=90_000)
        a.put("qwen", status)
        b.put("qwen", "unloaded")
        async with gateway(a=a, b=b) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await asyncio.sleep(0)  # it waits for a's load now
            assert gate.loader.progress("qwen") == f"{status} qwen on a".encode()
            if not a.is_listened_to:
                await a.until_asked("/events")
            a.put("qwen", "loaded")
            await waiting
            assert a.loads == b.loads == []

    run(main())


def test_a_model_that_comes_up_elsewhere_serves_who_waits() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=5000), FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a, b=b) as gate:
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            b.put("qwen", "loaded")
            await waiting
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]
            a.load_may_end.set()
            await until(gate.fleet, lambda: len(gate.fleet.replicas("qwen")) == 2)

    run(main())


def test_who_cannot_wait_longer_is_told_how_the_load_stands() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a, loading=Loading(wait_s=0.5)) as gate:
            error = await refused(gate)
            assert isinstance(error, ModelLoading)
            assert error.details == {"loading": {"state": "loading", "node": "a", "progress": 0.43}}
            assert error.retry_after_s == 5
            assert "loading on a" in error.message
            a.load_may_end.set()
            await until(gate.fleet, lambda: bool(gate.fleet.replicas("qwen")))
            assert len(a.loads) == 1

    run(main())


def test_a_callers_own_deadline_comes_before_the_settings() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            loop = asyncio.get_running_loop()
            with pytest.raises(ModelLoading):
                await gate.loader.ensure("qwen", 1, deadline=loop.time() + 0.2)

    run(main())


def test_the_estimate_comes_from_the_last_load_there_and_is_absent_before() -> None:
    async def main() -> None:
        a = FakeNeuron()
        async with gateway(a=a) as gate:
            a.load_may_end.clear()
            first = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/load")
            await asyncio.sleep(1.5)  # what the estimate will be
            a.load_may_end.set()
            await first
            await gate.loader.unload("qwen")
            a.load_may_end.clear()
            loop = asyncio.get_running_loop()
            with pytest.raises(ModelLoading) as caught:
                await gate.loader.ensure("qwen", 2, deadline=loop.time() + 0.2)
            assert 0.5 < caught.value.details["loading"]["eta_seconds"] < 5

    run(main())


def test_the_outlook_of_a_model_is_what_its_loads_took_and_failing_where_every_node_is_left_alone() -> None:
    async def main() -> None:
        a = FakeNeuron()
        async with gateway(a=a) as gate:
            assert gate.loader.outlook("qwen") == Outlook(None)
            await gate.loader.ensure("qwen", 1)
            await gate.loader.unload("qwen")
            took_s = gate.loader.outlook("qwen").wait_s
            assert took_s is not None
            assert 0 < took_s < 5
            a.load_failure = "the file is cut short"
            with pytest.raises(LoadFailed):
                await gate.loader.ensure("qwen", 2)
            assert gate.loader.outlook("qwen").is_failing

    run(main())


def test_a_load_that_stands_still_is_told_until_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_watch, "STILL_S", 0.3)

    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            asked = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/load")
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            assert gate.loader.standing_still() == []
            await asyncio.sleep(0.4)  # what is called still here
            [said] = gate.loader.standing_still()
            assert said.startswith("loading qwen on a has made no progress")
            a.put("qwen", "loading", progress=Progress(fraction=0.9))
            await until(gate.fleet, lambda: gate.fleet.nodes["a"].models["qwen"].progress == Progress(fraction=0.9))
            assert gate.loader.standing_still() == []
            a.load_may_end.set()
            await asked

    run(main())


def test_a_full_queue_is_told_and_does_not_disturb_who_waits() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a, loading=Loading(queue=2)) as gate:
            waiting = [asyncio.create_task(gate.loader.ensure("qwen", i)) for i in range(2)]
            await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
            error = await refused(gate, waiter=3)
            assert isinstance(error, Overloaded)
            assert "2 requests wait" in error.message
            a.load_may_end.set()
            await asyncio.gather(*waiting)

    run(main())


def test_a_request_that_leaves_takes_its_place_with_it_and_the_load_goes_on() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a, loading=Loading(queue=1)) as gate:
            for i in range(5):
                leaving = asyncio.create_task(gate.loader.ensure("qwen", i))
                await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            a.load_may_end.set()
            await gate.loader.ensure("qwen", 9)
            assert len(a.loads) == 1

    run(main())


def test_heartbeats_say_how_the_load_stands() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            assert gate.loader.progress("qwen") is None
            waiting = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await until(gate.fleet, lambda: gate.loader.progress("qwen") == b"loading qwen on a: 43 %")
            a.load_may_end.set()
            await waiting
            assert gate.loader.progress("qwen") is None

    run(main())
