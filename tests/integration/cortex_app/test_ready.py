"""GET /ready over a loader that stands still, as a probe sees it."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import FakeNeuron
from tests.helpers.fleets import until
from tests.helpers.http import Http
from tests.helpers.loaders import gateway

from helexa.core.relay.server import Server
from helexa.cortex import load_watch
from helexa.cortex.control import ControlPlane
from helexa.cortex.reload import Standing


def test_a_gateway_whose_load_stands_still_is_not_ready_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        a = FakeNeuron()
        a.load_may_end.clear()
        async with gateway(a=a) as gate:
            control = ControlPlane(
                gate.fleet,
                gate.loader,
                files=Standing(None),
                cors_origins=(),
                allowed_hosts=(),
                metrics=None,
                warnings=[],
                relayed=(),
            )
            server = Server(director=None, app=control)
            host, port = await server.listen("127.0.0.1", 0)
            probe = Http(f"http://{host}:{port}")
            try:
                asked = asyncio.create_task(gate.loader.ensure("qwen", 1))
                await a.until_asked("/models/load")
                await until(gate.fleet, lambda: gate.told("qwen", "a") == "loading")
                assert (await asyncio.to_thread(probe.get, "/ready")).status == 200
                with monkeypatch.context() as patch:
                    patch.setattr(load_watch, "STILL_S", 0.0)
                    patch.setattr(load_watch, "UNTOLD_STILL_S", 0.0)
                    answer = await asyncio.to_thread(probe.get, "/ready")
                assert answer.status == 503
                assert "loading qwen on a has made no progress" in answer.json()["error"]["message"]
                a.load_may_end.set()
                await asked
                assert (await asyncio.to_thread(probe.get, "/ready")).status == 200
            finally:
                await control.close()
                await server.close()

    run(main())
