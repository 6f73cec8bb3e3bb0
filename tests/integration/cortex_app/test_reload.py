"""Nodes and models are added and taken out by editing the files of a gateway that runs."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, Gateway, cortex, environment, write_settings
from tests.helpers.serving_neuron import ServingNeuron
from tests.integration.cortex_app.test_command_line import ask

QWEN = '[[models]]\nid = "qwen"\nvram_mb = 100\n'


def hang_up(gateway: Gateway) -> None:
    os.kill(gateway.daemon.process.pid, signal.SIGHUP)


async def nodes(gateway: Gateway, *names: str) -> None:
    await gateway.until("/fleet", lambda fleet: [n["name"] for n in fleet["nodes"]] == list(names))


def test_a_node_that_is_added_serves_and_one_that_is_taken_out_finishes_what_it_began(tmp_path: Path) -> None:
    beast, benjy = ServingNeuron(), ServingNeuron()
    beast.put("qwen", "loaded", tell=False, capabilities=["chat"])
    benjy.put("qwen", "loaded", tell=False, capabilities=["chat"])

    async def main() -> None:
        async with neurons(beast, benjy), cortex(tmp_path, {"beast": beast.url}, models=QWEN) as gateway:
            await gateway.until_up("beast")
            beast.plan.append(beast.paused)
            running = asyncio.create_task(gateway.chat("qwen", stream=True))
            await beast.arrived.wait()
            write_settings(tmp_path, {"benjy": benjy.url}, models=QWEN)  # noticed by itself
            await nodes(gateway, "benjy")
            await gateway.until_up("benjy")
            assert (await gateway.chat("qwen")).status == 200
            assert (len(beast.seen), len(benjy.seen)) == (1, 1)
            beast.go_on.set()
            answer = await running
            assert (answer.status, answer.body.endswith(b"data: [DONE]\n\n")) == (200, True)
            assert (await gateway.samples()).get('cortex_node_up{node="beast"}') is None

    run(main())


def test_models_and_aliases_change_and_a_load_for_a_node_that_is_taken_out_goes_elsewhere(tmp_path: Path) -> None:
    beast, benjy = ServingNeuron(), ServingNeuron()
    benjy.memory_mb = 20_000
    beast.load_may_end.clear()

    async def main() -> None:
        nodes = {"beast": beast, "benjy": benjy}
        async with (
            neurons(beast, benjy),
            cortex(tmp_path, {name: node.url for name, node in nodes.items()}, models=QWEN) as gateway,
        ):
            both = {name: node.url for name, node in nodes.items()}
            await gateway.until_up("beast", "benjy")
            assert (await gateway.chat("phi")).status == 404
            more = QWEN + '[[models]]\nid = "phi"\nvram_mb = 100\n[aliases]\nsmall = "phi"\n'
            write_settings(tmp_path, both, models=more)
            hang_up(gateway)
            await gateway.until("/v1/models", lambda listed: len(listed["data"]) == 2)
            waiting = asyncio.create_task(gateway.chat("small"))
            await beast.until_asked("/models/load")
            write_settings(tmp_path, {"benjy": benjy.url}, models=more)
            hang_up(gateway)
            assert (await waiting).status == 200
            assert [o.id for o in benjy.loads] == ["phi"]
            write_settings(tmp_path, {"benjy": benjy.url}, models=QWEN)
            hang_up(gateway)
            await gateway.until("/v1/models", lambda listed: all("aliases" not in e for e in listed["data"]))
            assert (await gateway.chat("small")).status == 404
            assert (await gateway.chat("phi")).status == 200  # it is loaded there still

    run(main())


def test_a_bad_file_is_refused_and_told_and_the_old_one_holds(tmp_path: Path) -> None:
    beast = ServingNeuron()
    beast.put("qwen", "loaded", tell=False, capabilities=["chat"])

    async def main() -> None:
        async with neurons(beast), cortex(tmp_path, {"beast": beast.url}, models=QWEN) as gateway:
            await gateway.until_up("beast")
            (tmp_path / "models.toml").write_text(QWEN + "vram_md = 3\n")
            hang_up(gateway)
            health = await gateway.until("/health", lambda said: "files_error" in said)
            assert "models.toml" in health["files_error"]
            assert "vram_mb" in health["files_error"]
            assert health["status"] == "ok"
            assert "the old ones hold" in (await ask(gateway, "status")).out
            assert (await gateway.chat("qwen")).status == 200
            write_settings(tmp_path, {"beast": beast.url}, SETTINGS + "[loading]\nqueue = 3\n", models=QWEN)
            hang_up(gateway)
            health = await gateway.until("/health", lambda said: "restart_for" in said)
            assert (health["restart_for"], "files_error" in health) == (["[loading] queue"], False)

    run(main())


def test_a_changed_profile_is_for_the_next_load_and_the_loaded_one_is_marked(tmp_path: Path) -> None:
    beast = ServingNeuron()

    async def main() -> None:
        async with neurons(beast), cortex(tmp_path, {"beast": beast.url}, models=QWEN) as gateway:
            await gateway.until_up("beast")
            assert (await gateway.chat("qwen")).status == 200
            beast.put("qwen", "loaded", spec_hash=beast.loads[0].spec_hash(), vram_used_mb=100)
            await gateway.until("/fleet", lambda fleet: "spec_hash" in fleet["nodes"][0]["models"][0])
            write_settings(tmp_path, {"beast": beast.url}, models=QWEN + "context = 2048\n")
            hang_up(gateway)
            fleet = await gateway.until("/fleet", lambda fleet: "loaded_differently" in fleet["nodes"][0]["models"][0])
            assert fleet["nodes"][0]["models"][0]["status"] == "loaded"
            assert "not as models.toml has it" in (await ask(gateway, "status")).out
            assert (await gateway.chat("qwen")).status == 200
            await gateway.post("/models/unload", {"model": "qwen"})
            assert (await gateway.chat("qwen")).status == 200
            assert [load.context for load in beast.loads] == [None, 2048]

    run(main())


def test_a_node_at_another_address_is_another_node_and_drained_it_stays_so(tmp_path: Path) -> None:
    old, new = ServingNeuron(), ServingNeuron()

    async def main() -> None:
        async with neurons(old, new), cortex(tmp_path, {"beast": old.url}, models=QWEN) as gateway:
            await gateway.until_up("beast")
            await gateway.post("/fleet/nodes/beast/drain", {})
            write_settings(tmp_path, {"beast": new.url}, models=QWEN)
            hang_up(gateway)
            fleet = await gateway.until("/fleet", lambda fleet: fleet["nodes"][0]["endpoint"] == new.url)
            assert fleet["nodes"][0]["set_aside"]
            await gateway.post("/fleet/nodes/beast/resume", {})
            await gateway.until("/fleet", lambda fleet: fleet["nodes"][0]["state"] == "up")
            assert (await gateway.chat("qwen")).status == 200
            assert (len(old.seen), len(new.seen)) == (0, 1)

    run(main())


def test_a_terminal_that_is_closed_ends_the_gateway_that_it_ran(tmp_path: Path) -> None:
    config, log = write_settings(tmp_path, {}), tmp_path / "log"
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "helexa.cortex", "serve", "-c", str(config)]
    with log.open("wb") as err:
        process = subprocess.Popen(command, stdin=its_end, stderr=err, env=environment(), start_new_session=True)
    os.close(its_end)
    try:
        until(lambda: b"listening" in log.read_bytes())
        process.send_signal(signal.SIGHUP)
        until(lambda: b"read again" in log.read_bytes())
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # as the kernel does, to what the terminal controls
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert b"shutting down" in log.read_bytes()


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
