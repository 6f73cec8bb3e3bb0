"""Prompt caches that survive a swap: real hosts whose engine has a cache of two texts, and a real folder."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.kv_states import put
from tests.helpers.nests import Nest, nest
from tests.helpers.scripted import Script

from helexa.core.config import ConfigError, NeuronSettings
from helexa.neuron.kv.store import ABANDONED_S, KvStore, folder_of, open_store

KEEPS = Script(keeps="yes")
LONG = "x" * 1000
OTHER = "y" * 1000


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


async def talk(n: Nest, text: str, name: str = "a") -> int:
    """How much of the text the engine knew."""
    answer = await n.ask(name, json.dumps({"do": "talk", "text": text}))
    known: int = answer.json()["known"]
    return known


def saved(n: Nest) -> list[Path]:
    return sorted((n.folder / "kv").glob("*.kv"))


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_a_conversation_goes_on_after_a_swap_where_it_was(tmp_path: Path, isolation: str) -> None:
    async def main() -> None:
        async with nest(tmp_path, isolation=isolation) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
            await talk(n, "short")
            await n.unload("a")
            [file] = saved(n)
            assert file.read_text() == LONG
            assert file.stat().st_mode & 0o777 == file.with_suffix(".json").stat().st_mode & 0o777 == 0o600
            assert file.parent.stat().st_mode & 0o777 == 0o700
            await n.load("a")
            assert await talk(n, OTHER) == 0  # a stranger takes the other slot
            assert await talk(n, LONG + LONG) == len(LONG)
            figures = n.models.kv_figures()
            assert figures is not None
            assert (figures.saved, figures.restored, figures.states, figures.size_bytes) == (1, 1, 1, len(LONG))

    run(main())


def test_the_next_turn_takes_the_place_of_the_last_and_what_was_only_restored_is_not_written_again(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            for text in (LONG, LONG + LONG):
                await n.load("a")
                await talk(n, text)
                await n.unload("a")
            [file] = saved(n)
            assert file.read_text() == LONG + LONG
            await n.load("a")
            await n.unload("a")
            assert saved(n) == [file]

    run(main())


def test_what_has_settled_is_written_ahead_of_the_unload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helexa.neuron.kv.states.SETTLE_S", 0.0)
    monkeypatch.setattr("helexa.neuron.models.LOOK_S", 0.05)

    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            seat = await n.seat("a")
            await seat.upstream.fetch("POST", "/x", json.dumps({"do": "talk", "text": LONG}).encode())
            await asyncio.sleep(0.3)
            assert saved(n) == []  # in use
            seat.release()
            while not saved(n):
                await asyncio.sleep(0.01)
            await n.unload("a")
            assert len(saved(n)) == 1

    run(main())


def test_nothing_is_saved_of_a_model_that_is_unloaded_by_force(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
            await n.unload("a", force=True)
            assert os.listdir(n.folder / "kv") == []

    run(main())


def test_a_daemon_that_ends_saves_what_is_idle(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
        async with nest(tmp_path) as n:
            await n.load("a")
            assert await talk(n, LONG) == len(LONG)

    run(main())


def test_other_settings_another_file_or_a_damaged_state_are_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            model = n.model("a", KEEPS)

            async def once(context: int) -> int:
                await n.load("a", context=context)
                known = await talk(n, LONG)
                await n.unload("a")
                return known

            assert await once(1024) == 0
            assert await once(1024) == len(LONG)
            assert await once(2048) == 0
            assert len(saved(n)) == 1  # of the settings before nothing is left
            os.utime(model, ns=(0, 0))
            assert await once(2048) == 0
            [file] = saved(n)
            file.write_text(OTHER)
            await n.load("a", context=2048)
            assert saved(n) == []
            assert await talk(n, OTHER) == 0

    run(main())


def test_an_engine_that_dies_of_a_state_comes_back_without_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", Script(keeps="dies"))
            await n.load("a")
            await talk(n, LONG)
            await n.unload("a")
            assert len(saved(n)) == 1
            await n.load("a")
            await n.until(lambda: n.states("a")[-2:] == ["recovering", "loaded"])
            assert saved(n) == []
            assert await talk(n, LONG) == 0

    run(main())


def test_a_crash_loses_nothing_that_was_saved_and_leaves_nothing_half(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
            await n.unload("a")
            await n.load("a")
            await talk(n, OTHER)
            os.kill(n.pid("a"), 9)
            await n.until(lambda: n.info("a").status == "recovering")
            await n.until(lambda: n.info("a").status == "loaded")
            assert await talk(n, LONG) == len(LONG)
            assert await talk(n, OTHER) == 0

    run(main())


def test_a_host_that_is_recycled_keeps_its_conversations(tmp_path: Path) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
            assert (await n.models.defrag())["recycled"] == ["a"]
            assert await talk(n, LONG) == len(LONG)

    run(main())


def test_turned_off_nothing_is_written_and_what_was_there_goes(tmp_path: Path) -> None:
    async def main() -> None:
        for keeps in (True, False):
            async with nest(tmp_path, kv_store=keeps) as n:
                n.model("a", KEEPS)
                await n.load("a")
                await talk(n, LONG)
                await n.unload("a")
                assert len(saved(n)) == keeps
                assert (n.models.kv_figures() is not None) == keeps

    run(main())


def test_a_full_disk_is_told_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with nest(tmp_path) as n:
            n.model("a", KEEPS)
            await n.load("a")
            await talk(n, LONG)
            await n.unload("a")
            before = saved(n)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
            for _ in range(2):
                await n.load("a")
                await talk(n, LONG + LONG)
                await n.unload("a")
            assert saved(n) == before

    run(main())
    assert capsys.readouterr().err.count("prompt caches are not saved") == 1


# the folder


def store(folder: Path, **settings: Any) -> KvStore:
    return KvStore(folder, **({"limit_mb": 1, "max_age_s": 1000.0} | settings))


def test_the_bounds_hold_from_the_start_on(tmp_path: Path) -> None:
    kept = store(tmp_path / "kv")
    old = put(kept, "old", used_at=time.time() - 500)
    new = put(kept, "new")
    later = store(tmp_path / "kv", max_age_s=100)
    later.sweep()
    assert not later.path_of(old).exists()
    assert later.is_sound(new)
    assert later.figures.states == 1
    half = "z" * 600_000
    put(later, half)
    put(later, half.upper())
    assert later.figures.size_bytes < 1 << 20


def test_what_was_never_finished_is_swept_away_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    kept = store(tmp_path / "kv")
    fresh, left = kept.begin(1), kept.begin(1)
    assert fresh is not None
    assert left is not None
    os.utime(left, (0, time.time() - ABANDONED_S - 1))
    (kept.folder / "nobody.json").write_text("{")
    kept.sweep()
    assert os.listdir(kept.folder) == [fresh.name]


def test_a_state_that_cannot_be_read_now_stays_and_a_stranger_in_the_folder_hinders_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path / "kv")
    state = put(kept, "one")
    (kept.folder / "stranger.json").mkdir()
    for path in kept.folder.iterdir():
        os.utime(path, (0, time.time() - ABANDONED_S - 1))

    def full(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", full)
        kept.sweep()
    assert kept.find("key", "m") == [state]
    assert kept.is_sound(state)


def test_a_removed_model_takes_its_states_along(tmp_path: Path) -> None:
    kept = store(tmp_path / "kv")
    put(kept, "one", files=["/a.gguf"])
    stays = put(kept, "two", files=["/b.gguf"])
    assert kept.forget([Path("/a.gguf"), Path("/c.gguf")]) == 1
    assert kept.find("key", "m") == [stays]


def test_a_folder_that_others_may_enter_is_refused_by_name(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"kv_store_dir.*chmod 700"):
        open_store(NeuronSettings(kv_store_dir=str(tmp_path)), {})


def test_without_a_place_of_its_own_the_store_is_off() -> None:
    assert open_store(NeuronSettings(), {}) is None
    assert folder_of(NeuronSettings(), {"HOME": "/h"}) == Path("/h/.cache/helexa/kv")
    assert folder_of(NeuronSettings(), {"CACHE_DIRECTORY": "/var/cache/helexa:/b", "HOME": "/h"}) == Path(
        "/var/cache/helexa/kv"
    )
