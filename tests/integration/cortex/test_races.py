"""Two gateways on one fleet, nodes that are cut off for a while, and nodes whose clocks are wrong."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.loaders import Gateway, gateway, second_gateway

from helexa.core.catalogue import ModelProfile

LOADS = 150  # five hundred on real nodes: bench.fleet race
MODELS = [ModelProfile(id=f"m{number}", vram_mb=mb) for number, mb in enumerate((3000, 4000, 5000, 6000, 7000, 9000))]


class StrictNeuron(FakeNeuron):
    """Counts how often it held more than it has, and what was unloaded while it was in use."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.needs_mb = {model.id: model.vram_mb or 0 for model in MODELS}
        self.wrongs: list[str] = []

    def put(self, model_id: str, status: str, *, tell: bool = True, **fields: Any) -> None:
        before = self.models.get(model_id)
        if status == "unloaded" and before is not None and before.active_requests:
            self.wrongs.append(f"{model_id} was unloaded in use")
        super().put(model_id, status, tell=tell, **fields)
        if sum(m.vram_used_mb or 0 for m in self.models.values()) > self.memory_mb:
            self.wrongs.append(f"over-committed with {model_id}")


async def request(gate: Gateway, nodes: dict[str, StrictNeuron], model: str, waiter: int) -> None:
    """Waits for the model, and is at work there for a moment; begins again where it has gone meanwhile."""
    while True:
        await gate.loader.ensure(model, waiter, asyncio.get_running_loop().time() + 50)
        for replica in gate.fleet.replicas(model):
            info = nodes[replica.node.name].models[model]
            if info.status != "loaded":  # the view is behind; a real node would have said so
                gate.fleet.model_refused(replica, info.status)
                break
            info.active_requests = (info.active_requests or 0) + 1
            replica.begin(asyncio.get_running_loop().time())
            await asyncio.sleep(0.002)
            replica.end(asyncio.get_running_loop().time())
            info = nodes[replica.node.name].models[model]
            info.active_requests = (info.active_requests or 1) - 1
            return


def test_two_gateways_race_for_150_loads_without_over_commit_or_a_lost_request() -> None:
    async def main() -> None:
        nodes = {name: StrictNeuron(memory_mb=10_000) for name in "abc"}
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(gateway(MODELS, **nodes))
            second = await stack.enter_async_context(second_gateway(MODELS, **nodes))
            served = 0

            async def client(number: int) -> None:
                nonlocal served
                rng, gate = Random(number), (first, second)[number % 2]
                while sum(len(node.loads) for node in nodes.values()) < LOADS:
                    await request(gate, nodes, rng.choice(MODELS).id, number)
                    served += 1

            await asyncio.gather(*(client(number) for number in range(8)))
            assert [node.wrongs for node in nodes.values()] == [[], [], []]
            assert served >= LOADS / 4

    run(main())


def test_a_partition_that_heals_loses_no_model_and_loads_none_twice() -> None:
    """Nothing gets through to one node for a while, in the middle of a load; both sides live on."""

    async def main() -> None:
        a, b = FakeNeuron(), FakeNeuron()
        a.put("kept", "loaded", tell=False, vram_used_mb=1000)
        a.load_may_end.clear()
        models = [ModelProfile(id="qwen", vram_mb=5000), ModelProfile(id="kept", vram_mb=1000, pinned_on=["a"])]
        async with gateway(models, interval_s=0.2, a=a, b=b) as gate:
            b.answers["/models/load"] = (409, b'{"error": {"code": "insufficient_memory", "message": "later"}}')
            asked = asyncio.create_task(gate.loader.ensure("qwen", 1))
            await a.until_asked("/models/load")
            a.hanging.add("*")
            await until(gate.fleet, lambda: gate.fleet.nodes["a"].state == "down")
            assert gate.where("kept") == []
            a.load_may_end.set()  # it ends where nobody sees it
            a.hanging.clear()
            await until(gate.fleet, lambda: gate.fleet.nodes["a"].state == "up")
            await asked
            assert (gate.where("qwen"), gate.where("kept")) == (["a"], ["a"])
            assert len(a.loads) == 1

    run(main())


@pytest.mark.parametrize("told", ["2099-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "yesterday", "2026-13-45", ""])
def test_a_node_whose_clock_is_wrong_makes_room_all_the_same(told: str) -> None:
    async def main() -> None:
        a = FakeNeuron(memory_mb=10_000)
        for name in ("x", "y"):
            a.put(name, "loaded", tell=False, vram_used_mb=4000, last_used=told)
        async with gateway(a=a) as gate:
            await gate.loader.ensure("qwen", 1)
            assert gate.where("qwen") == ["a"]
            assert len(a.unloads) == 1

    run(main())
