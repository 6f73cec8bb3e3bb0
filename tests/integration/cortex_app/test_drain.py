"""A node is taken out of the fleet by the operator, and given back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import Gateway, cortex
from tests.helpers.serving_neuron import ServingNeuron
from tests.integration.cortex_app.test_command_line import ask

CATALOGUE = '[[models]]\nid = "qwen"\nvram_mb = 100\n[[models]]\nid = "pinned"\nvram_mb = 100\npinned_on = ["beast"]\n'


def served(node: ServingNeuron) -> int:
    return len(node.seen)


async def state(gateway: Gateway, name: str = "beast") -> tuple[str, bool]:
    [node] = [n for n in (await gateway.get("/fleet")).json()["nodes"] if n["name"] == name]
    return node["state"], node.get("set_aside", False)


def test_a_drained_node_gets_nothing_new_what_runs_there_ends_and_its_models_are_loaded_elsewhere(
    tmp_path: Path,
) -> None:
    beast, benjy = ServingNeuron(), ServingNeuron()
    beast.put("qwen", "loaded", tell=False, capabilities=["chat"])

    async def scenario() -> None:
        nodes = {"beast": beast.url, "benjy": benjy.url}
        async with cortex(tmp_path, nodes, models=CATALOGUE) as gateway:
            await gateway.until_up("beast", "benjy")
            beast.plan.append(beast.paused)
            running = asyncio.create_task(gateway.chat("qwen", stream=True))
            await beast.arrived.wait()
            said = (await gateway.post("/fleet/nodes/beast/drain", {})).json()
            assert said == {"node": "beast", "state": "draining", "set_aside": True, "running": 1}
            for _ in range(3):
                assert (await gateway.chat("qwen")).status == 200
            assert (served(beast), served(benjy)) == (1, 3)
            assert ([o.id for o in beast.loads], [o.id for o in benjy.loads]) == ([], ["qwen"])
            assert await state(gateway) == ("draining", True)
            shown = (await ask(gateway, "status")).out
            assert "drained by the operator; `cortex resume beast` ends that" in shown
            waiting = asyncio.create_task(ask(gateway, "drain", "beast", "--wait"))
            beast.go_on.set()
            answer = await running
            assert (answer.status, answer.body.endswith(b"data: [DONE]\n\n")) == (200, True)
            done = await waiting
            assert (done.code, "nothing runs on it" in done.out) == (0, True)

    async def main() -> None:
        async with neurons(beast, benjy):
            await scenario()

    run(main())


def test_what_only_a_drained_node_may_hold_is_refused_with_the_way_out_and_served_again_after_resume(
    tmp_path: Path,
) -> None:
    beast = ServingNeuron()

    async def main() -> None:
        async with neurons(beast), cortex(tmp_path, {"beast": beast.url}, models=CATALOGUE) as gateway:
            await gateway.until_up("beast")
            assert (await ask(gateway, "drain", "beast")).code == 0
            refused = await gateway.chat("pinned")
            assert (refused.status, refused.json()["error"]["code"]) == (503, "no_node")
            assert "cortex resume beast" in refused.json()["error"]["message"]
            assert (await gateway.get("/ready")).status == 503
            ordered = await gateway.post("/models/load", {"model": "pinned", "node": "beast"})
            assert (ordered.status, "cortex resume beast" in ordered.json()["error"]["message"]) == (503, True)
            plan = (await gateway.get("/fleet/plan?model=pinned")).json()
            assert (plan["action"], plan["weighed"][0]["node"]) == ("refuse", "beast")
            assert beast.loads == []
            resumed = json.loads((await ask(gateway, "resume", "beast", "--json")).out)
            assert resumed == {"node": "beast", "state": "up", "set_aside": False, "running": 0}
            assert (await gateway.chat("pinned")).status == 200

    run(main())


def test_a_load_on_a_node_that_is_drained_goes_elsewhere_with_those_who_wait_for_it(tmp_path: Path) -> None:
    beast, benjy = ServingNeuron(), ServingNeuron()
    benjy.memory_mb = 20_000  # beast leaves less room over, and is taken first
    beast.load_may_end.clear()

    async def main() -> None:
        async with neurons(beast, benjy):
            nodes = {"beast": beast.url, "benjy": benjy.url}
            async with cortex(tmp_path, nodes, models=CATALOGUE) as gateway:
                await gateway.until_up("beast", "benjy")
                waiting = asyncio.create_task(gateway.chat("qwen"))
                await beast.until_asked("/models/load")
                await gateway.post("/fleet/nodes/beast/drain", {})
                assert (await waiting).status == 200
                assert (served(beast), served(benjy)) == (0, 1)
                beast.load_may_end.set()

    run(main())


def test_a_drained_node_that_dies_is_still_drained_when_it_is_back(tmp_path: Path) -> None:
    beast = ServingNeuron()

    async def main() -> None:
        async with neurons(beast), cortex(tmp_path, {"beast": beast.url}) as gateway:
            await gateway.until_up("beast")
            await gateway.post("/fleet/nodes/beast/drain", {})
            await beast.die()
            await gateway.until("/fleet", lambda fleet: fleet["nodes"][0]["state"] == "down")
            await beast.start()
            fleet = await gateway.until("/fleet", lambda fleet: fleet["nodes"][0]["state"] != "down")
            assert fleet["nodes"][0]["state"] == "draining"

    run(main())


def test_unknown_nodes_and_web_pages_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with cortex(tmp_path, {"beast": "http://127.0.0.1:9"}) as gateway:
            unknown = await gateway.post("/fleet/nodes/baest/drain", {})
            assert (unknown.status, unknown.json()["error"]["code"]) == (404, "not_found")
            assert "did you mean beast?" in unknown.json()["error"]["message"]
            assert (await ask(gateway, "resume", "a/b")).code == 1
            page = await gateway.post("/fleet/nodes/beast/drain", {}, headers={"origin": "https://evil.example"})
            assert (page.status, page.json()["error"]["code"]) == (403, "permission_denied")
            form = await gateway.post("/fleet/nodes/beast/drain", b"a=b", headers={"content-type": "text/plain"})
            assert form.status == 415
            assert await state(gateway) == ("down", False)
            assert (await gateway.get("/fleet/nodes/beast/drain")).status == 405
            bare = await gateway.post("/fleet/nodes/beast/drain", b"")
            assert (bare.status, bare.json()["set_aside"]) == (200, True)

    run(main())
