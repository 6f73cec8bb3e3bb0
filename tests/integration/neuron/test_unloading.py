"""Unloading, draining and shutting down, on real host processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from tests.helpers.aio import run
from tests.helpers.nests import children, exchange, nest, read_out
from tests.helpers.scripted import Gate, Script, loads_of

from helexa.core.errors import (
    Conflict,
    ModelUnloading,
    ShuttingDown,
)

both = pytest.mark.parametrize("isolation", ["process", "none"])


def test_an_unload_cancels_a_load(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(gate=str(gate.path)))
            loading = asyncio.create_task(n.load("a"))
            await gate.reached()
            await n.unload("a")
            with pytest.raises(ModelUnloading):
                await loading
            assert n.states("a") == ["loading", "unloading", "unloaded"]
            assert not children()
            assert n.models._devices.ledger.used_mb(0) == 0
            gate.close()

    run(main())


@both
def test_a_load_during_an_unload_follows_it(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            path = n.model("a")
            await n.load("a")
            unloading = asyncio.create_task(n.unload("a"))
            await n.until(lambda: n.info("a").status == "unloading")
            assert await n.load("a") == "loaded"
            await unloading
            assert loads_of(path) == 2

    run(main())


@both
def test_a_model_in_use_is_not_unloaded(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            n.model("a")
            await n.load("a")
            seat = await n.seat("a")
            with pytest.raises(Conflict) as refused:
                await n.unload("a")
            assert refused.value.code == "model_in_use"
            assert refused.value.details == {"active_requests": 1}
            with pytest.raises(Conflict):
                await n.unload("a", drain_s=0.05)
            assert n.states("a") == ["loading", "loaded", "unloading", "loaded"]
            assert (await n.ask("a")).status == 200
            seat.release()
            await n.unload("a")

    run(main())


@both
def test_a_drain_lets_running_requests_end_and_refuses_new_ones(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            n.model("a", Script(slots=1))
            await n.load("a")
            seat = await n.seat("a")
            waiting = asyncio.create_task(n.seat("a"))
            await asyncio.sleep(0)
            unloading = asyncio.create_task(n.unload("a", drain_s=20))
            with pytest.raises(ModelUnloading):
                await waiting
            with pytest.raises(ModelUnloading):
                n.models.admit(exchange("a"))
            assert not unloading.done()
            assert (await seat.upstream.fetch("POST", "/v1/chat/completions", b"{}")).status == 200
            seat.release()
            await unloading
            assert n.info("a").status == "unloaded"

    run(main())


@both
def test_force_cuts_a_drain_and_what_runs(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            n.model("a")
            await n.load("a")
            seat = await n.seat("a")
            async with seat.upstream.stream("POST", "/v1/chat/completions", b'{"do":"stall"}') as stream:
                data = aiter(stream)
                await anext(data)
                patient = asyncio.create_task(n.unload("a", drain_s=20))
                await asyncio.sleep(0)
                await n.unload("a", force=True)
                await patient
                with pytest.raises(ConnectionError):
                    await read_out(data)
            seat.release()
            assert n.info("a").status == "unloaded"

    run(main())


def test_a_host_that_does_not_quit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helexa.neuron.resident.QUIT_S", 0.05)

    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(deaf=True))
            await n.load("a")
            await n.unload("a")
            assert not children()

    run(main())


def test_an_engine_in_the_daemon_that_does_not_end_keeps_its_memory_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helexa.neuron.resident.QUIT_S", 0.02)
    monkeypatch.setattr("helexa.neuron.hosts.END_S", 0.02)

    async def main() -> None:
        async with nest(tmp_path, isolation="none", total_mb=1000) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(deaf=str(gate.path), needs_mb=600))
            n.model("b", Script(needs_mb=600))
            await n.load("a")
            with pytest.raises(Conflict) as refused:
                await n.unload("a")
            assert refused.value.code == "not_ended"
            assert n.info("a").status == "failed"
            assert "does not let go" in (n.info("a").error or "")
            with pytest.raises(Conflict) as full:
                await n.load("b")
            assert full.value.code == "insufficient_memory"
            await gate.reached()
            gate.open()
            ledger = n.models._devices.ledger
            while ledger.used_mb(0):
                await asyncio.sleep(0.005)
            assert await n.load("b") == "loaded"

    run(main())


def test_a_load_in_the_daemon_ends_where_the_engine_next_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helexa.neuron.hosts.END_S", 20.0)

    async def main() -> None:
        async with nest(tmp_path, isolation="none") as n:
            gate = Gate(tmp_path / "gate")
            path = n.model("a", Script(gate=str(gate.path), needs_mb=300))
            loading = asyncio.create_task(n.load("a"))
            await gate.reached()
            unloading = asyncio.create_task(n.unload("a"))
            await n.until(lambda: n.info("a").status == "unloading")
            assert n.models._devices.ledger.used_mb(0) == 300
            gate.open()
            await unloading
            with pytest.raises(ModelUnloading):
                await loading
            assert n.models._devices.ledger.used_mb(0) == 0
            assert not n.sockets()
            assert loads_of(path) == 1

    run(main())


def test_shutting_down_refuses_wakes_who_waits_and_ends_everything(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(slots=1))
            n.model("b", Script(gate=str(gate.path)))
            await n.load("a")
            await n.seat("a")
            waiting = asyncio.create_task(n.seat("a"))
            loading = asyncio.create_task(n.load("b"))
            await gate.reached()
            n.models.close_admission()
            with pytest.raises(ShuttingDown):
                await waiting
            with pytest.raises(ShuttingDown):
                n.models.admit(exchange("a"))
            with pytest.raises(ShuttingDown):
                await n.load("a")
            await n.models.stop()
            with pytest.raises(ShuttingDown):
                await loading
            gate.close()

    run(main())


def test_an_unload_waits_until_the_driver_gave_the_memory_back(tmp_path: Path) -> None:
    class Card:
        """A GPU whose driver frees a dead process's memory only after it was looked at a few times."""

        def __init__(self) -> None:
            self.pid = 0
            self.late_looks = 3

        def process_mb(self, pid: int) -> dict[int, int]:
            self.pid = pid
            return {0: 300}

        def says_mb(self) -> int:
            if not self.pid:
                return 1000
            if not psutil.pid_exists(self.pid):
                self.late_looks -= 1
            return 700 if self.late_looks > 0 else 1000

    async def main() -> None:
        card = Card()
        async with nest(tmp_path, total_mb=1000, kind="cuda", says_mb=card.says_mb, process_mb=card.process_mb) as n:
            n.model("a", Script(needs_mb=250))
            await n.load("a")
            assert n.info("a").vram_used_mb == 300
            await n.models._devices.refresh()
            assert n.models.device_health()[0].vram_free_mb == 700
            await n.unload("a")
            assert card.late_looks <= 0
            assert n.models.device_health()[0].vram_free_mb == 1000

    run(main())
