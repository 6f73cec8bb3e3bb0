"""Where the loader loads: once for all who ask, where the file and the room are, or a refusal that says why."""

from __future__ import annotations

import asyncio

import msgspec
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import QWEN, gateway, refused

from helexa.core.catalogue import ModelProfile
from helexa.core.errors import ModelNotServable
from helexa.cortex.loads import LoadRecord


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
