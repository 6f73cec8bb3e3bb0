"""The loader against neurons that refuse, fail, hang and die."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import QWEN, Gateway, gateway

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Loading
from helexa.core.errors import (
    BadRequest,
    Conflict,
    HelexaError,
    LoadFailed,
    ModelLoading,
    ModelNotServable,
    NoNode,
    Overloaded,
    ShuttingDown,
)
from helexa.core.lifecycle import Progress
from helexa.cortex import load_watch
from helexa.cortex.fallbacks import Outlook
from helexa.cortex.loads import LoadRecord


async def refused(gate: Gateway, model_id: str = "qwen", waiter: int = 1) -> HelexaError:
    with pytest.raises(HelexaError) as caught:
        await gate.loader.ensure(model_id, waiter)
    return caught.value


def test_a_cold_load_under_50_concurrent_requests_is_one_load_with_the_whole_profile() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        async with gateway(a=a, b=b) as gate:
            records: list[LoadRecord] = []
            gate.loader.on_load.append(records.append)
            await asyncio.gather(*(gate.loader.ensure("qwen", i) for i in range(50)))
            assert [r.node.name for r in gate.fleet.replicas("qwen")] in (["a"], ["b"])
            [order] = a.loads + b.loads
            assert order == QWEN.load_request()
            [record] = records
            assert (record.model, record.error) == ("qwen", None)
            assert record.seconds > 0
            await gate.loader.ensure("qwen", 99)
            assert len(a.loads + b.loads) == 1

    run(main())


def test_a_model_on_a_nodes_disk_that_no_catalogue_names_is_loaded_there_by_the_nodes_name() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=50_000), FakeNeuron()
        b.put("org/phi:Q8_0", "unloaded")
        async with gateway(a=a, b=b) as gate:
            await gate.loader.ensure("org/phi:Q8_0", 1)
            assert [order.id for order in b.loads] == ["org/phi:Q8_0"]
            assert a.loads == []

    run(main())


def test_where_nothing_is_known_of_the_need_the_file_comes_before_the_room_and_room_before_none() -> None:
    async def main() -> None:
        a, b, c = FakeNeuron(memory_mb=1000), FakeNeuron(memory_mb=2000), FakeNeuron(memory_mb=9000)
        for fake in (a, b):
            fake.put("qwen", "unloaded")
        async with gateway([ModelProfile(id="qwen")], a=a, b=b, c=c) as gate:
            await gate.loader.ensure("qwen", 1)
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


def test_pins_are_kept() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=50_000), FakeNeuron(memory_mb=500)
        pinned = ModelProfile(id="qwen", pinned_on=["b"])
        async with gateway([pinned], a=a, b=b) as gate:
            await gate.loader.ensure("qwen", 1)
            assert [r.node.name for r in gate.fleet.replicas("qwen")] == ["b"]

    run(main())


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


def test_pinned_models_in_the_way_are_named_at_once() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.put("big", "loaded", vram_used_mb=9000)
        async with gateway([QWEN, ModelProfile(id="big", pinned_on=["a"])], a=a) as gate:
            error = await refused(gate)
            assert isinstance(error, ModelNotServable)
            assert "beside what is pinned (big)" in error.message
            assert error.details["pins"] == ["big"]
            assert a.loads == []

    run(main())


def test_what_no_node_could_hold_when_empty_is_refused_at_once() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=4000), FakeNeuron(memory_mb=3000)
        async with gateway(a=a, b=b) as gate:
            error = await refused(gate)
            assert isinstance(error, ModelNotServable)
            assert "a: needs 5,000 MB (vram_mb), and has 4,000 MB even when empty" in error.message
            assert a.loads == b.loads == []

    run(main())


def test_what_never_fits_is_told_with_what_it_is_made_of_and_what_would_fit() -> None:
    part = {"index": 0, "weights_mb": 3000, "kv_mb": 8000, "overhead_mb": 200, "free_mb": 10_000}
    ways = ["slots = 1", "context = 2048"]
    never = {"fits": False, "never": True, "why": "too much", "ways": ways, "devices": [part]}

    async def main() -> None:
        a = FakeNeuron(memory_mb=10_000)
        a.answers["/models/estimate"] = (200, msgspec.json.encode(never))
        async with gateway([ModelProfile(id="qwen", source="org/qwen")], a=a) as gate:
            error = await refused(gate)
            assert isinstance(error, ModelNotServable)
            assert (
                "a: needs 11,200 MB (estimate: weights 3,000, KV cache 8,000, overhead 200), and has 10,000 MB even "
                "when empty; it would fit with slots = 1 or context = 2048" in error.message
            )
            (told,) = error.details["nodes"]
            assert (told["node"], told["need_mb"], told["kv_mb"]) == ("a", 11_200, 8000)
            assert told["ways"] == ways
            assert a.loads == []

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


def test_several_models_load_on_one_node_side_by_side() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        models = [ModelProfile(id=f"m{i}") for i in range(4)]
        async with gateway(models, a=a) as gate:
            waiting = [asyncio.create_task(gate.loader.ensure(m.id, m.id)) for m in models]
            await until(gate.fleet, lambda: all(gate.told(m.id, "a") == "loading" for m in models))
            a.load_may_end.set()
            await asyncio.gather(*waiting)

    run(main())


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
