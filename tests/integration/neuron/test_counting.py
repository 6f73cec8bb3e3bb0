"""Tokens are counted for models that are not loaded: by hosts without weights, few of them, in nobody's way."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.nests import Nest, children, nest
from tests.helpers.scripted import COUNTING_MB, Script, counting_hosts_of, loads_of

from helexa.core.errors import LoadFailed, ModelNotFound, Overloaded, ShuttingDown
from helexa.neuron.counters import IDLE_S, MOST

BODY = b"three words here"


async def count(n: Nest, name: str) -> int:
    return await n.models.count_tokens(name, BODY, n.request(name))


def test_a_count_loads_nothing_and_touches_no_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            file = n.model("a")
            await n.scan()
            n.events.clear()
            assert await n.models.count_tokens("a", BODY) == 3  # by its name on disk alone
            assert await n.models.count_tokens("a", BODY) == 3
            assert (loads_of(file), counting_hosts_of(file)) == (0, 1)
            assert n.states("a") == []
            assert (n.info("a").status, n.info("a").last_used) == ("unloaded", None)
            (device,) = n.models.device_health()
            assert device.vram_free_mb == 10_000  # a load may have it all

    run(main())


def test_a_load_ends_it_and_the_model_s_own_host_counts_from_then_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, total_mb=50) as n:
            file = n.model("a", Script(needs_mb=50))
            await count(n, "a")
            await n.load("a")
            assert await count(n, "a") == 3
            assert [process.pid for process in children()] == [n.pid("a")]
            assert n.info("a").last_used is None
            assert counting_hosts_of(file) == 1
            await n.unload("a")
            assert await count(n, "a") == 3
            assert (loads_of(file), counting_hosts_of(file)) == (1, 2)

    run(main())


def test_no_more_than_a_few_count_at_a_time_and_everybody_gets_an_answer(tmp_path: Path) -> None:
    names = "abcde"

    async def main() -> None:
        async with nest(tmp_path) as n:
            files = [n.model(name) for name in names]
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, len(children()))
                    await asyncio.sleep(0.01)

            watching = asyncio.create_task(watch())
            assert await asyncio.gather(*(count(n, name) for name in names * 2)) == [3] * 10
            watching.cancel()
            assert most == MOST
            assert sum(map(counting_hosts_of, files)) <= 10

    run(main())


def test_who_did_not_count_for_long_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await count(n, "a")
            n.models._counters.look()
            assert len(children()) == 1
            (counter,) = n.models._counters._counters.values()
            counter.last_used = time.monotonic() - IDLE_S - 1
            n.models._counters.look()
            await n.models._counters.make_way()  # waits for those that end
            assert not children()

    run(main())


def test_a_counting_host_that_was_killed_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            file = n.model("a")
            await count(n, "a")
            (host,) = children()
            host.kill()
            while n.models._counters._counters:
                await asyncio.sleep(0.01)
            assert await count(n, "a") == 3
            assert counting_hosts_of(file) == 2

    run(main())


def test_where_not_even_that_fits_or_nothing_is_there_it_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path, total_mb=COUNTING_MB + 10) as n:
            n.model("full", Script(needs_mb=20))
            n.model("a")
            n.model("broken", Script(fail="it is broken"))
            await n.scan()
            with pytest.raises(LoadFailed, match="it is broken"):
                await count(n, "broken")
            with pytest.raises(ModelNotFound):
                await n.models.count_tokens("nobody", BODY)
            await n.load("full")
            with pytest.raises(Overloaded, match="no memory to count"):
                await count(n, "a")
            assert len(children()) == 1

    run(main())


def test_a_shutdown_cuts_a_count_that_a_load_has_already_sent_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            await count(n, "a")
            (host,) = children()
            host.suspend()  # its next count never ends
            counting = asyncio.create_task(count(n, "a"))
            counters = n.models._counters
            while not any(counter.active for counter in counters._counters.values()):
                await asyncio.sleep(0)
            await counters.make_way()
            await n.models.stop()
            with pytest.raises(ShuttingDown):
                await counting
            assert not children()

    run(main())


def test_a_shutdown_ends_counts_that_have_just_begun(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a")
            counting = asyncio.create_task(count(n, "a"))
            while not n.models._counters._counters:
                await asyncio.sleep(0)
            await n.models.stop()
            with pytest.raises(ShuttingDown):
                await counting
            with pytest.raises(ShuttingDown):
                await count(n, "a")

    run(main())
