"""Hosts that die, and what they leave: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.helpers.aio import run
from tests.helpers.nests import children, exchange, nest, read_out
from tests.helpers.neuron_daemon import neuron
from tests.helpers.raw import until
from tests.helpers.scripted import Gate, Script, loads_of

from helexa.core.errors import (
    LoadFailed,
    ModelLoading,
)
from helexa.neuron import step_watch
from helexa.neuron.run_dir import RunDir


def test_a_host_that_dies_in_its_load_is_told_with_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(die=1))
            with pytest.raises(LoadFailed, match=r"exit code 7.*the script says die"):
                await n.load("a")

    run(main())


def test_a_host_killed_in_its_load_is_told_as_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(gate=str(gate.path)))
            loading = asyncio.create_task(n.load("a"))
            await gate.reached()
            (host,) = children()
            host.send_signal(signal.SIGKILL)
            with pytest.raises(LoadFailed, match="SIGKILL"):
                await loading
            assert n.info("a").status == "failed"
            gate.close()

    run(main())


def test_a_host_whose_step_does_not_end_is_killed_with_its_ranks_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_watch, "LEAST_S", 0.3)

    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(ranks=2))
            await n.load("a")
            before = psutil.Process(n.pid("a"))
            family = [before, *before.children()]
            assert len(family) == 3
            seat = await n.seat("a")
            async with seat.upstream.stream("POST", "/v1/chat/completions", b'{"do":"hang"}') as stream:
                data = aiter(stream)
                await anext(data)  # host and request stand still from here on
                with pytest.raises(ConnectionError):
                    await read_out(data)
            seat.release()
            await n.until(lambda: n.states("a")[-2:] == ["recovering", "loaded"])
            await until(lambda: not any(process.is_running() for process in family))
            reasons = [body["error"] for _, body in n.events if body.get("error")]
            assert "the engine stood still: step 1 has run for" in reasons[0]
            assert (await n.ask("a")).status == 200

    run(main())


def test_the_memory_of_a_hosts_ranks_counts_with_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(ranks=2))
            await n.load("a")
            host = psutil.Process(n.pid("a"))
            serving = n.models._residents["a"].serving
            assert serving is not None
            held = serving.host.memory()
            assert held is not None
            alone = host.memory_info().rss
            assert held.total > alone + sum(rank.memory_info().rss for rank in host.children()) * 0.9 - (1 << 20)

    run(main())


def test_prints_of_an_engine_do_not_break_the_protocol(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(noise='{"event":"failed","error":"a lie"}\n\x00\xff not utf-8 ' + "x" * 200_000))
            assert await n.load("a") == "loaded"

    run(main())


def test_a_host_killed_while_it_serves_comes_back_by_itself(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a")
            seat = await n.seat("a")
            async with seat.upstream.stream("POST", "/v1/chat/completions", b'{"do":"stall"}') as stream:
                data = aiter(stream)
                assert b"data:" in await anext(data)
                first = n.pid("a")
                os.kill(first, signal.SIGKILL)
                with pytest.raises(ConnectionError):
                    await read_out(data)
            seat.release()
            await n.until(lambda: n.states("a")[-2:] == ["recovering", "loaded"])
            assert n.pid("a") != first
            assert (await n.ask("a")).status == 200
            assert n.models.counts.host_deaths == {"a": 1}

    run(main())


def test_requests_are_told_that_a_model_recovers(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, backoff_s=30) as n:
            n.model("a", Script(slots=1))
            await n.load("a")
            seat = await n.seat("a")
            waiting = asyncio.create_task(n.seat("a"))
            await asyncio.sleep(0)
            os.kill(n.pid("a"), signal.SIGKILL)
            with pytest.raises(ModelLoading) as told:
                await waiting
            assert told.value.details["loading"]["state"] == "recovering"
            with pytest.raises(ModelLoading):
                n.models.admit(exchange("a"))
            seat.release()
            assert n.info("a").status == "recovering"
            assert "SIGKILL" in (n.info("a").error or "")
            assert n.info("a").vram_used_mb  # its memory stays its own
            assert await n.load("a", wait=False) == "loading"
            await n.unload("a")
            assert n.states("a")[-3:] == ["recovering", "unloading", "unloaded"]

    run(main())


def test_a_model_that_keeps_dying_is_given_up_with_the_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            path = n.model("a")
            await n.load("a")
            n.model("a", Script(die=1000))
            os.kill(n.pid("a"), signal.SIGKILL)
            await n.until(lambda: n.states("a")[-1] == "failed")
            assert "the script says die" in (n.info("a").error or "")
            assert loads_of(path) == 1 + 5
            assert n.models._devices.ledger.used_mb(0) == 0

    run(main())


def test_the_spare_is_used_and_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, spare_host=True) as n:
            n.model("a")
            hosts = n.models._hosts
            assert hosts._spare_task is not None
            await hosts._spare_task
            (spare,) = children()
            await n.load("a")
            assert n.pid("a") == spare.pid
            await hosts._spare_task
            assert len(children()) == 2
            before = hosts._spare
            await n.models.defrag()
            await hosts._spare_task
            assert hosts._spare is not None
            assert hosts._spare is not before
            hosts._spare._kill()
            await hosts._spare._gone.wait()
            n.model("b")
            assert await n.load("b") == "loaded"

    run(main())


def test_in_the_daemons_own_process_the_same_holds(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation="none") as n:
            n.model("a")
            n.model("bad", Script(fail="no"))
            assert await n.load("a") == "loaded"
            assert (await n.ask("a")).json()["pid"] == os.getpid()
            with pytest.raises(LoadFailed, match="no"):
                await n.load("bad")
            await n.unload("a")
            assert not n.sockets()
            assert await n.load("a") == "loaded"

    run(main())


def test_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")

            async def cycle() -> None:
                await n.load("a")
                await n.ask("a")
                await n.unload("a")

            await cycle()
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                await cycle()
            assert len(os.listdir("/proc/self/fd")) <= before
            assert not children()
            assert not n.sockets()

    run(main())


def test_a_daemon_that_is_killed_takes_its_hosts_with_it_and_the_next_sweeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with neuron(tmp_path) as daemon:
        daemon.wait_for(event="ready")
        parent = psutil.Process(daemon.process.pid)
        while not (hosts := parent.children()):
            time.sleep(0.01)
        (left,) = [folder for folder in daemon.runtime.glob("**/helexa-*") if folder.is_dir()]
        daemon.process.kill()
        daemon.process.wait()
        gone, alive = psutil.wait_procs(hosts, 5)
        assert gone
        assert not alive
        monkeypatch.setattr("helexa.core.private_folder.YOUNG_S", -1)
        RunDir(None, {"XDG_RUNTIME_DIR": str(left.parent.parent)}).remove()
        assert not left.exists()


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_a_host_at_work_shows_life_and_a_stuck_one_does_not(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            n.model("a")
            await n.load("a")
            seat = await n.seat("a")
            serving = n.models._residents["a"].serving
            assert serving is not None
            serving.host.look()
            before = seat.host_progress()
            await n.ask("a", '{"do":"burn"}')
            serving.host.look()
            at_work = seat.host_progress()
            assert at_work > before
            if isolation == "process":  # the threads of this one have nothing to do, and this test's own are no sign
                os.kill(n.pid("a"), signal.SIGSTOP)
            until = time.process_time() + 0.1
            while time.process_time() < until:
                pass
            serving.host.look()
            serving.host.look()
            assert seat.host_progress() == at_work
            if isolation == "process":
                os.kill(n.pid("a"), signal.SIGCONT)  # it would be waited for
            seat.release()
            await n.unload("a", force=True)

    run(main())


def test_an_engine_at_work_is_no_sign_of_life_of_another_in_the_same_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation="none") as n:
            for name in ("a", "b"):
                n.model(name, Script(worker=True))
                await n.load(name)
            serving = [n.models._residents[name].serving for name in ("a", "b")]
            at_work, idle = [it.host for it in serving if it is not None]
            for host in (at_work, idle):
                host.look()
            before = at_work.alive_at(), idle.alive_at()
            await n.ask("a", '{"do":"work"}')
            for host in (at_work, idle):
                host.look()
            assert at_work.alive_at() > before[0]
            assert idle.alive_at() == before[1]

    run(main())


def test_a_host_that_lies_is_no_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a")
            with pytest.raises(ConnectionError):
                await n.ask("a", '{"do":"lie"}')
            assert (await n.ask("a")).status == 200

    run(main())
