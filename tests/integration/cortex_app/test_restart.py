"""A gateway that was killed comes back, knows the fleet with its first poll, and costs no node a model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, cortex
from tests.helpers.serving_neuron import ServingNeuron

ONE_POLL = SETTINGS.replace("interval_s = 0.4", "interval_s = 60")  # no test lives to see the second
MODELS = "".join(f'[[models]]\nid = "{name}"\nvram_mb = 4000\n' for name in ("hot", "cold", "coming"))


def test_a_gateway_that_was_killed_learns_the_whole_fleet_in_one_poll_and_loses_no_model(tmp_path: Path) -> None:
    beast, benjy = ServingNeuron(), ServingNeuron()
    beast.put("hot", "loaded", tell=False, vram_used_mb=4000, capabilities=["chat"])
    benjy.put("hot", "loaded", tell=False, vram_used_mb=4000, capabilities=["chat"])
    benjy.put("cold", "loaded", tell=False, vram_used_mb=4000, capabilities=["chat"])

    async def main() -> None:
        async with neurons(beast, benjy):
            nodes = {"beast": beast.url, "benjy": benjy.url}
            beast.load_may_end.clear()
            async with cortex(tmp_path, nodes, toml=ONE_POLL, models=MODELS) as before:
                beast.plan.append(beast.paused)  # either may get it
                benjy.plan.append(benjy.paused)
                cut = asyncio.create_task(before.chat("hot", stream=True))
                waiting = asyncio.create_task(before.chat("coming"))
                await beast.until_asked("/models/load")
                before.daemon.process.kill()
                await asyncio.gather(cut, waiting, return_exceptions=True)
            beast.plan.clear()
            benjy.plan.clear()
            async with cortex(tmp_path, nodes, toml=ONE_POLL, models=MODELS) as again:
                fleet = (await again.get("/fleet")).json()
                told = {(n["name"], m["id"]): m["status"] for n in fleet["nodes"] for m in n["models"]}
                assert {n["name"]: n["state"] for n in fleet["nodes"]} == {"beast": "up", "benjy": "up"}
                assert told == {
                    ("beast", "hot"): "loaded",
                    ("benjy", "hot"): "loaded",
                    ("benjy", "cold"): "loaded",
                    ("beast", "coming"): "loading",
                }
                assert (await again.chat("hot")).status == (await again.chat("cold")).status == 200
                follows = asyncio.create_task(again.chat("coming"))
                await again.until("/fleet/plan?model=coming", lambda plan: plan.get("waiting") == 1)
                beast.load_may_end.set()
                assert (await follows).status == 200
            assert [order.id for order in beast.loads] == ["coming"], "the load of before is followed"
            assert (benjy.loads, beast.unloads, benjy.unloads) == ([], [], [])

    run(main())
