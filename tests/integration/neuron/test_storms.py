"""Everything at once, by chance: whatever the order, no state is wrong and nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.nests import Nest, children, nest
from tests.helpers.scripted import Script

from helexa.core.errors import HelexaError
from helexa.core.lifecycle import NEXT, ModelStatus

NAMES = ("a", "b", "c")


async def act(n: Nest, chance: random.Random) -> None:
    name = chance.choice(NAMES)
    what = chance.choice(["load", "load", "begin", "unload", "drain", "force", "kill", "ask", "ask", "leave"])
    await asyncio.sleep(chance.random() * 0.2)
    try:
        if what == "load":
            await n.load(name)
        elif what == "begin":
            await n.load(name, wait=False, context=chance.choice([1024, 2048]))
        elif what == "unload":
            await n.unload(name)
        elif what == "drain":
            await n.unload(name, drain_s=0.1)
        elif what == "force":
            await n.unload(name, force=True)
        elif what == "kill":
            hosts = children()
            if hosts:
                os.kill(chance.choice(hosts).pid, signal.SIGKILL)
        elif what == "ask":
            await n.ask(name)
        else:
            await abandoned(n, name)
    except (HelexaError, ConnectionError, ProcessLookupError):
        pass


async def abandoned(n: Nest, name: str) -> None:
    """A load and a wait for a seat whose callers leave."""
    tasks = [asyncio.create_task(n.load(name)), asyncio.create_task(n.ask(name))]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception) and not isinstance(outcome, (HelexaError, ConnectionError)):
            raise outcome


@pytest.mark.parametrize("seed", range(4))
def test_after_any_storm_the_node_is_empty_and_can_load(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with nest(tmp_path, total_mb=1000, spare_host=seed % 2 == 0) as n:
            for name in NAMES:
                n.model(name, Script(needs_mb=400, slots=1, die=chance.choice([0, 0, 1])))
            await n.scan()
            for _ in range(12):
                await asyncio.gather(*(act(n, chance) for _ in range(8)))
                assert n.models._devices.ledger.used_mb(0) <= 1000
            for name in NAMES:
                await n.unload(name, force=True)
                assert n.info(name).status == "unloaded"
                assert_lawful(n, name)
            assert n.models._devices.ledger.claims == set()
            assert await n.load("a") == "loaded"
            assert (await n.ask("a")).status == 200

    run(main(), timeout_s=90)
    assert "nobody foresaw" not in capsys.readouterr().err


def assert_lawful(n: Nest, name: str) -> None:
    """Each published state followed the one before by the table."""
    states = [ModelStatus.UNLOADED, *(ModelStatus(state) for state in n.states(name))]
    for before, after in itertools.pairwise(states):
        assert after is before or after in NEXT[before], states
