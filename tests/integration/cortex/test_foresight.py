"""What is foreseen for a model is what then happens, and foreseeing it changes nothing."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.loaders import Gateway, gateway

from helexa.core.catalogue import ModelProfile
from helexa.core.config import Bounds, Loading
from helexa.core.errors import HelexaError, Overloaded
from helexa.cortex.foresight import Foreseen


def holding(*models: str, mb: int = 8000, memory_mb: int = 10_000) -> FakeNeuron:
    node = FakeNeuron(memory_mb=memory_mb)
    for model in models:
        node.put(model, "loaded", tell=False, vram_used_mb=mb)
    return node


def used(gate: Gateway, model: str, *, times: int, ago_s: float) -> None:
    at = time.monotonic() - ago_s
    [replica] = gate.fleet.replicas(model)
    for _ in range(times):
        replica.begin(at)
        replica.end(at)


async def foresee(gate: Gateway, model: str = "qwen") -> Foreseen:
    """Twice, which must come to the same."""
    survey = gate.loader.survey
    before = (dict(survey.promises), gate.loader.decisions.last(), gate.loader._state)
    foreseen = await gate.loader.foresight.of(model)
    again = await gate.loader.foresight.of(model)
    assert (again.action, again.node, again.weighed and [w.node for w in again.weighed]) == (
        foreseen.action, foreseen.node, foreseen.weighed and [w.node for w in foreseen.weighed],
    )  # fmt: skip
    assert (dict(survey.promises), gate.loader.decisions.last(), gate.loader._state) == before
    return foreseen


def reasons(foreseen: Foreseen) -> dict[str, str | None]:
    return {w.node: w.reason for w in foreseen.weighed}


def test_a_loaded_model_would_be_served_by_the_routers_choice() -> None:
    async def main() -> None:
        a, b = holding("qwen"), holding("qwen")
        async with gateway(a=a, b=b) as gate:
            first, _ = gate.fleet.replicas("qwen")
            first.begin(0.0)
            foreseen = await foresee(gate)
            assert (foreseen.action, foreseen.node) == ("serve", "b")
            assert [(r.node, r.inflight, r.chosen) for r in foreseen.replicas] == [("a", 1, False), ("b", 0, True)]
            assert "of 2 replicas it has the fewest requests in flight (0)" in foreseen.why

    run(main())


def test_the_node_the_victims_and_the_price_are_those_of_the_load_that_follows() -> None:
    async def main() -> None:
        a, b = holding("cold", "odd", mb=4000), holding("warm")
        async with gateway(a=a, b=b) as gate:
            used(gate, "cold", times=1, ago_s=100)
            used(gate, "odd", times=1, ago_s=200)
            used(gate, "warm", times=90, ago_s=1)
            foreseen = await foresee(gate)
            assert (foreseen.action, foreseen.node, a.unloads, a.loads) == ("load", "a", [], [])
            load = foreseen.load
            assert load is not None
            assert (load.need_mb, load.need_by, [d.mb for d in load.devices]) == (5000, "vram_mb", [5000])
            assert [v.model for v in load.victims] == ["odd"]
            assert sum(v.score for v in load.victims) == pytest.approx(
                load.price, rel=0.01
            )  # a score falls as time goes
            assert reasons(foreseen) == {"a": None, "b": None}
            assert foreseen.weighed[1].victims == ("warm",)
            await gate.loader.ensure("qwen", 1)
            assert [order.id for order in a.unloads] == ["odd"]
            [evict] = [d for d in gate.loader.decisions.last() if d.what == "evict"]
            assert evict.price == pytest.approx(load.price, rel=0.01)

    run(main())


def test_what_can_never_be_is_foreseen_as_it_would_be_refused_with_each_nodes_reason() -> None:
    async def main() -> None:
        pinned = ModelProfile(id="rock", pinned_on=["b"])
        a, b, c, d = holding(memory_mb=4000), holding("rock"), holding(), FakeNeuron()
        models = [ModelProfile(id="qwen", vram_mb=5000, pinned_on=["a", "b"]), pinned]
        async with gateway(models, a=a, b=b, c=c, d=d) as gate:
            foreseen = await foresee(gate)
            with pytest.raises(HelexaError) as refused:
                await gate.loader.ensure("qwen", 1)
            assert foreseen.action == "refuse"
            assert foreseen.error is not None
            assert (foreseen.error.status, foreseen.error.code) == (404, "model_not_servable")
            assert foreseen.error.message == refused.value.message
            told = reasons(foreseen)
            assert "has 4,000 MB even when empty" in (told["a"] or "")
            assert "what is pinned there leaves too little: rock" in (told["b"] or "")
            assert told["c"] == told["d"] == "pinned_on allows only a, b"

    run(main())


def test_where_everything_is_in_use_it_would_wait_and_is_told_what_has_to_finish_then() -> None:
    async def main() -> None:
        a = holding("busy")
        async with gateway(a=a) as gate:
            gate.requests("busy")
            foreseen = await foresee(gate)
            assert foreseen.action == "wait"
            assert "after 15 s busy on a would have to finish and go" in foreseen.why
            assert foreseen.then is not None
            assert [(v.model, v.drains) for v in foreseen.then.victims] == [("busy", True)]
            assert "busy is in use (1 request)" in (reasons(foreseen)["a"] or "")

    run(main())


def test_a_model_that_others_wait_for_would_be_waited_for_with_them_up_to_the_bound() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(loading=Loading(queue=2), a=a) as gate:
            waiting = [asyncio.create_task(gate.loader.ensure("qwen", 1))]
            await a.until_asked("/models/load")
            foreseen = await foresee(gate)
            assert (foreseen.action, foreseen.node, foreseen.waiting) == ("wait", "a", 1)
            assert "it is loading on a" in foreseen.why
            waiting.append(asyncio.create_task(gate.loader.ensure("qwen", 2)))
            await asyncio.sleep(0)
            full = await foresee(gate)
            assert full.error is not None
            assert (full.action, full.error.code) == ("refuse", "overloaded")
            a.load_may_end.set()
            await asyncio.gather(*waiting)

    run(main())


def test_a_node_that_is_down_or_has_failed_lately_says_so() -> None:
    async def main() -> None:
        a, c = FakeNeuron(), FakeNeuron()
        a.load_errors["qwen"] = (422, {"code": "load_impossible", "message": "the file is cut short."})
        models = [ModelProfile(id="qwen", vram_mb=5000)]
        async with gateway(models, a=a, c=c) as gate:
            await c.die()
            gate.fleet.saw_miss(gate.fleet.nodes["c"], "connection refused")
            gate.fleet.saw_miss(gate.fleet.nodes["c"], "connection refused")
            with pytest.raises(HelexaError):
                await gate.loader.ensure("qwen", 1)
            told = reasons(await foresee(gate))
            assert (told["a"] or "").startswith("the file is cut short; it is tried again in ")
            assert (told["c"] or "").startswith("is down (")

    run(main())


def test_where_nobody_knows_the_need_the_node_that_would_be_asked_is_named() -> None:
    async def main() -> None:
        a, b = FakeNeuron(memory_mb=4000), FakeNeuron()
        async with gateway([ModelProfile(id="qwen")], a=a, b=b) as gate:
            foreseen = await foresee(gate)
            assert (foreseen.action, foreseen.node) == ("load", "b")
            assert "what qwen needs is not known" in foreseen.why

    run(main())


def test_an_estimate_is_asked_for_as_the_load_would_ask_it() -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.needs_mb["qwen"] = 20_000
        async with gateway([ModelProfile(id="qwen")], a=a) as gate:
            foreseen = await foresee(gate)
            assert foreseen.action == "refuse"
            assert "needs 20,000 MB (estimate: weights 20,000" in foreseen.why
            assert a.asked["/models/estimate"] == 1

    run(main())


def test_of_several_models_the_plan_is_that_of_the_first_that_can_be_had() -> None:
    async def main() -> None:
        a, b = FakeNeuron(), holding("qwen")
        models = [ModelProfile(id="best", vram_mb=100, pinned_on=["a"]), ModelProfile(id="qwen", vram_mb=5000)]
        async with gateway(models, a=a, b=b) as gate:
            first = await gate.loader.foresight.of_first(("best", "qwen"))
            assert (first.model, first.action, first.candidates) == ("best", "load", ["best", "qwen"])
            gate.fleet.set_aside(gate.fleet.nodes["a"], True)
            then = await gate.loader.foresight.of_first(("best", "qwen"))
            assert (then.model, then.action, then.node) == ("qwen", "serve", "b")
            assert (await gate.loader.foresight.of_first(("best",))).action == "refuse"

    run(main())


@pytest.mark.parametrize(("bounds", "of_node"), [(Bounds(running=1, waiting=2), None), (None, Bounds(running=1))])
def test_what_bounds_hold_back_is_foreseen_to_wait_and_what_is_over_them_to_be_refused(
    bounds: Bounds | None, of_node: Bounds | None
) -> None:
    async def main() -> None:
        model = ModelProfile(id="qwen", vram_mb=5000, limits=bounds)
        async with gateway([model], loading=Loading(queue=2), a=holding("qwen")) as gate:
            gate.fleet.nodes["a"].bounds = of_node
            assert (await foresee(gate)).action == "serve"
            gate.requests("qwen")
            held = await foresee(gate)
            assert (held.action, held.node, held.waiting) == ("wait", None, 0)
            assert [(r.node, r.inflight, r.chosen, r.full) for r in held.replicas] == [("a", 1, False, bool(of_node))]
            assert "`limits` allow" in held.why
            turns = [gate.loader.admission.enter("qwen", client) for client in "xy"]
            over = await foresee(gate)
            assert (over.action, over.waiting) == ("refuse", 2)
            with pytest.raises(Overloaded) as refused:
                gate.loader.admission.enter("qwen", "z")
            assert over.error is not None
            assert (over.error.code, over.error.message) == (refused.value.code, refused.value.message)
            gate.loader.admission.leave(turns[0], served=False)
            assert "1 request waits for a place before it" in (await foresee(gate)).why

    run(main())


def test_a_replica_whose_node_is_full_is_not_the_one_that_is_foreseen() -> None:
    async def main() -> None:
        async with gateway(a=holding("qwen"), b=holding("qwen")) as gate:
            gate.fleet.nodes["a"].bounds = Bounds(running=1)
            a, b = gate.fleet.replicas("qwen")
            a.begin(0.0)
            for _ in range(3):
                b.begin(0.0)
            foreseen = await foresee(gate)
            assert (foreseen.action, foreseen.node) == ("serve", "b")
            assert [r.full for r in foreseen.replicas] == [True, False]

    run(main())
