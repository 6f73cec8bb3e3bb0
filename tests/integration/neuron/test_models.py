"""Loading, listing and refusing, on real host processes with an engine that does as it is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.nests import children, exchange, nest
from tests.helpers.scripted import Gate, Script, loads_of, write_model

from helexa.core.errors import (
    BadRequest,
    Conflict,
    HelexaError,
    LoadFailed,
    ModelLoading,
    ModelNotFound,
    NeverLoads,
)
from helexa.core.lifecycle import LoadRequest


def test_a_model_is_loaded_answers_and_is_gone_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            assert await n.load("a") == "loaded"
            pid = n.pid("a")
            answer = await n.ask("a")
            assert answer.status == 200
            assert answer.json()["pid"] == pid != os.getpid()
            info = n.info("a")
            assert info.status == "loaded"
            assert info.harness == "scripted"
            assert info.vram_used_mb is not None
            assert info.load_seconds
            assert info.last_used
            assert info.limits is not None
            assert info.limits.slots == 2
            await n.unload("a")
            assert not children()
            assert not n.sockets()
            assert n.info("a").status == "unloaded"
            assert n.info("a").memory is None
            assert n.states("a") == ["loading", "loaded", "unloading", "unloaded"]

    run(main())


def test_fifty_loads_at_once_are_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            path = n.model("a")
            states = await asyncio.gather(*(n.load("a", wait=i % 2 == 0) for i in range(50)))
            assert set(states) <= {"loaded", "loading"}
            assert states[0] == "loaded"
            assert await n.load("a") == "loaded"
            assert loads_of(path) == 1
            assert len(children()) == 1

    run(main())


def test_a_load_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(gate=str(gate.path)))
            caller = asyncio.create_task(n.load("a"))
            await gate.reached()
            caller.cancel()
            await asyncio.wait({caller})
            assert caller.cancelled()
            gate.open()
            assert await n.load("a") == "loaded"

    run(main())


def test_models_load_side_by_side(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("slow", Script(gate=str(gate.path)))
            n.model("fast")
            slow = asyncio.create_task(n.load("slow"))
            await gate.reached()
            assert await n.load("fast") == "loaded"
            assert (await n.ask("fast")).status == 200
            with pytest.raises(ModelLoading) as loading:
                await n.ask("slow")
            assert loading.value.details["loading"]["state"] == "loading"
            gate.open()
            await slow

    run(main())


def test_progress_is_told_while_a_model_loads(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            gate = Gate(tmp_path / "gate")
            n.model("a", Script(gate=str(gate.path)))
            loading = asyncio.create_task(n.load("a"))
            await gate.reached()
            await n.until(lambda: any("progress" in body for _, body in n.events))
            progress = n.info("a").progress
            assert progress is not None
            assert progress.fraction == 0.5
            gate.open()
            await loading
            assert n.info("a").progress is None

    run(main())


def test_a_load_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(fail="the moon is in the way"))
            with pytest.raises(LoadFailed, match="the moon is in the way"):
                await n.load("a")
            assert n.info("a").status == "failed"
            assert "moon" in (n.info("a").error or "")
            with pytest.raises(LoadFailed, match="moon"):
                await n.ask("a")
            assert not children()
            n.model("a")
            assert await n.load("a") == "loaded"

    run(main())


def test_a_profile_that_differs_from_the_loaded_one_is_a_conflict(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a", context=1024)
            assert await n.load("a", context=1024) == "loaded"
            with pytest.raises(Conflict) as refused:
                await n.load("a", context=2048)
            assert refused.value.code == "loaded_differently"
            assert refused.value.details["spec_hash"] == n.info("a").spec_hash

    run(main())


def test_what_does_not_fit_now_is_told_with_figures_and_what_never_fits_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, total_mb=1000) as n:
            n.model("a", Script(needs_mb=700))
            n.model("b", Script(needs_mb=600))
            n.model("huge", Script(needs_mb=1001))
            await n.scan()
            await n.load("a")
            with pytest.raises(Conflict) as refused:
                await n.load("b")
            assert refused.value.code == "insufficient_memory"
            assert refused.value.details["need_mb"] == 600
            assert refused.value.details["free_mb"] == 300
            assert refused.value.details["devices"] == [{"index": 0, "need_mb": 600, "free_mb": 300}]
            assert n.info("b").status == "unloaded"
            with pytest.raises(NeverLoads) as never:
                await n.load("huge")
            assert never.value.details["need_mb"] == 1001
            await n.unload("a")
            assert await n.load("b") == "loaded"

    run(main())


def test_loads_at_once_never_share_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, total_mb=1000) as n:
            for name in "abcd":
                n.model(name, Script(needs_mb=400))
            done = await asyncio.gather(*(n.load(name) for name in "abcd"), return_exceptions=True)
            assert sorted(str(d) for d in done if d == "loaded") == ["loaded", "loaded"]
            assert sum(isinstance(d, Conflict) for d in done) == 2
            assert n.models._devices.ledger.used_mb(0) == 800

    run(main())


def test_a_file_that_is_not_whole_and_a_bad_option_are_refused_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("half", Script(truncated=True))
            with pytest.raises(NeverLoads, match="not whole"):
                await n.load("half", wait=False)
            with pytest.raises(NeverLoads):
                await n.load("absent", wait=False)
            n.model("a")
            with pytest.raises(BadRequest) as bad:
                await n.load("a", slots=0)
            assert bad.value.param == "slots"
            with pytest.raises(BadRequest) as bad:
                await n.load("a", harness="nope")
            assert bad.value.param == "harness"
            with pytest.raises(BadRequest):
                await n.models.load(LoadRequest(), wait=True, local_caller=True)
            assert n.models.listing() == []  # names that came to nothing are not kept

    run(main())


def test_a_driver_mismatch_refuses_loads(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, refuse_loads="The driver was updated; reboot.") as n:
            n.model("a")
            with pytest.raises(NeverLoads, match="reboot"):
                await n.load("a")

    run(main())


def test_what_is_on_disk_is_listed_and_told_how_to_be_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        write_model(tmp_path / "qwen" / "small.gguf")
        async with nest(tmp_path) as n:
            (info,) = n.models.listing()
            assert (info.id, info.status) == ("qwen/small", "unloaded")
            with pytest.raises(ModelLoading, match="/models/load") as told:
                n.models.admit(exchange("qwen/small"))
            assert told.value.details["loading"]["state"] == "unloaded"
            with pytest.raises(ModelNotFound, match="qwen/small"):
                n.models.admit(exchange("qwen/smal"))
            await n.models.load(LoadRequest(model_id="qwen/small"), wait=True, local_caller=False)
            assert [i.status for i in n.models.listing()] == ["loaded"]

    run(main())


def test_a_file_loaded_under_another_id_is_listed_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            path = n.model("a")
            await n.scan()
            await n.models.load(LoadRequest(model_id="other", source=str(path)), wait=True, local_caller=True)
            assert [i.id for i in n.models.listing()] == ["other"]
            assert n.models.files_in_use() == {path}

    run(main())


def test_default_models_load_in_the_background_and_their_failure_is_listed(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    good = write_model(tmp_path / "good.gguf", Script(gate=str(gate.path)))
    defaults = [
        LoadRequest(model_id="good", source=str(good)),
        LoadRequest(model_id="gone", source=str(tmp_path / "gone.gguf")),
    ]

    async def main() -> None:
        async with nest(tmp_path, default_models=defaults) as n:
            await gate.reached()
            await n.until(lambda: "failed" in n.states("gone"))
            assert n.info("gone").error
            assert n.info("good").status == "loading"
            gate.open()
            await n.until(lambda: n.states("good")[-1] == "loaded")

    run(main())


def test_defrag_waits_for_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a")
            seat = await n.seat("a")
            with pytest.raises(Conflict):
                await n.models.defrag()
            seat.release()
            told = await n.models.defrag()
            assert told["before"][0]["vram_free_mb"] > 0
            assert told["after"][0]["vram_free_mb"] > 0

    run(main())


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_defrag_gives_every_loaded_model_a_fresh_host(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            files = [n.model(name) for name in ("a", "b", "c")]
            await n.load("a")
            await n.load("b")
            before, used = (await n.ask("a")).json()["pid"], n.info("a").vram_used_mb
            both = await asyncio.gather(n.models.defrag(), n.models.defrag())
            assert both[0] is both[1]
            assert both[0]["recycled"] == ["a", "b"]
            assert n.states("a")[-3:] == ["loaded", "recovering", "loaded"]
            assert [loads_of(file) for file in files] == [2, 2, 0]
            assert ((await n.ask("a")).json()["pid"] != before) == (isolation == "process")
            assert n.info("a").vram_used_mb == used
            assert n.info("a").error is None

    run(main())


def test_a_request_that_comes_while_a_host_is_recycled_is_told_that_it_loads(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a")
            work = asyncio.create_task(n.models.defrag())
            await n.until(lambda: n.info("a").status == "recovering")
            with pytest.raises(ModelLoading):
                await n.seat("a")
            await work
            await n.ask("a")

    run(main())


def test_an_unload_in_the_midst_of_recycling_wins(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await n.load("a")
            work = asyncio.create_task(n.models.defrag())
            await n.until(lambda: n.info("a").status == "recovering")
            await n.unload("a")
            assert (await work)["recycled"] == []
            assert n.info("a").status == "unloaded"

    run(main())


def test_an_estimate_loads_nothing_and_leaves_its_own_model_out_of_account(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, total_mb=1000) as n:
            n.model("a", Script(needs_mb=700))
            assert (await n.models.estimate(n.request("a"))).fits
            assert n.models.listing() == []
            await n.load("a")
            assert (await n.models.estimate(n.request("a"))).fits
            with pytest.raises(ModelNotFound):
                await n.models.estimate(LoadRequest(model_id="owner/unknown"))

    run(main())


def test_what_the_hub_would_refuse_is_told_at_once_and_leaves_no_failed_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            wanted = LoadRequest(model_id="owner/repo", source="owner/repo")
            with pytest.raises(HelexaError, match="owner/repo"):
                await n.models.load(wanted, wait=False, local_caller=True)
            assert n.models.listing() == []
            assert not n.states("owner/repo") or n.states("owner/repo") == ["unloaded"]

    run(main())
