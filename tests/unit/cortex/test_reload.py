"""The files are read again when they have changed; a bad one is told, and the old one holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.helpers.aio import run

from helexa.cortex.reload import Files, Read, Reloader, waiting

ONE = '[[neurons]]\nname = "a"\nendpoint = "http://a:1"\n'
TWO = ONE + '[[neurons]]\nname = "b"\nendpoint = "http://b:1"\n'


class Site:
    """A cortex.toml, and what was made of it."""

    def __init__(self, folder: Path, text: str = ONE, every_s: float = 0.02) -> None:
        self.config = folder / "cortex.toml"
        self.models = folder / "models.toml"
        self.config.write_text(text)
        self.files = Files(self.config, {})
        self.read = self.files.read(lambda _: None)
        self.applied: list[Read] = []
        self.news = asyncio.Event()
        self.reloader = Reloader(self.files, self.read.settings, self.read.catalogue_path, self.apply, every_s=every_s)

    def apply(self, read: Read) -> list[str]:
        self.applied.append(read)
        self.news.set()
        return []

    async def until_applied(self) -> Read:
        await self.news.wait()
        self.news.clear()
        await self.settled()
        return self.applied[-1]

    async def settled(self) -> None:
        """The reloader has looked at the files twice since."""
        await asyncio.sleep(0.1)

    def replace(self, path: Path, text: str) -> None:
        """As editors do it."""
        other = path.with_suffix(".new")
        other.write_text(text)
        os.replace(other, path)


@asynccontextmanager
async def watched(site: Site) -> AsyncIterator[Site]:
    site.reloader.start()
    try:
        yield site
    finally:
        await site.reloader.stop()


def test_a_changed_file_is_read_again_and_a_catalogue_that_appears_beside_it_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            site.replace(site.config, TWO)
            assert [n.name for n in (await site.until_applied()).settings.neurons] == ["a", "b"]
            site.replace(site.models, '[[models]]\nid = "m"\n')
            read = await site.until_applied()
            assert ([m.id for m in read.catalogue.models], read.catalogue_path) == (["m"], site.models)
            assert site.reloader.standing.catalogue_path == site.models
            site.replace(site.models, '[[models]]\nid = "n"\n')
            assert [m.id for m in (await site.until_applied()).catalogue.models] == ["n"]
            site.models.unlink()
            assert (await site.until_applied()).catalogue.models == []
            assert len(site.applied) == 4

    run(main())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[neurons", "is not TOML"),
        (ONE + "[eviction]\nstrategy = 'lur'\n", '"lru"'),
        (ONE + ONE, "is used twice"),
        ("[gateway]\nmodels_config = 'nowhere.toml'\n", "which is not there"),
    ],
)
def test_a_bad_file_is_told_in_the_words_of_the_start_and_mended_it_is_forgotten(
    tmp_path: Path, text: str, words: str
) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            site.replace(site.config, text)
            await site.settled()
            standing = site.reloader.standing
            assert site.applied == []
            assert words in (standing.error or "")
            assert any("the old ones hold" in warning for warning in standing.warnings())
            site.replace(site.config, TWO)
            await site.until_applied()
            assert (standing.error, standing.warnings()) == (None, [])

    run(main())


def test_what_waits_for_a_restart_is_named_and_what_does_not_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            site.replace(site.config, f"drain_s = 3\n[loading]\nwait_s = 7\n[gateway]\nlisten = '127.0.0.1:1'\n{TWO}")
            await site.until_applied()
            assert site.reloader.standing.restart_for == ["[gateway] listen", "[loading] wait_s", "drain_s"]
            assert "[loading] wait_s" in site.reloader.standing.warnings()[0]
            site.replace(site.config, TWO)
            await site.until_applied()
            assert site.reloader.standing.warnings() == []

    run(main())


def test_a_file_that_is_not_to_be_watched_is_read_when_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path, "[gateway]\nwatch_files = false\n" + ONE)) as site:
            site.replace(site.config, "[gateway]\nwatch_files = false\n" + TWO)
            await site.settled()
            assert site.applied == []
            site.reloader.at_once()
            assert len((await site.until_applied()).settings.neurons) == 2

    run(main())


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site(tmp_path, every_s=0.2)
        async with watched(site):
            text = ""
            for line in TWO.splitlines(keepends=True):
                text += line
                site.config.write_text(text)
                await asyncio.sleep(0.05)
            assert len((await site.until_applied()).settings.neurons) == 2
            assert (len(site.applied), site.reloader.standing.error) == (1, None)

    run(main())


def test_without_files_there_is_nothing_to_watch() -> None:
    files = Files(None, {"CORTEX_DRAIN_S": "3"})
    read = files.read(lambda _: None)
    assert (read.settings.drain_s, read.catalogue_path, files.stamp(None)) == (3, None, ())
    assert waiting(read.settings, read.settings) == []
