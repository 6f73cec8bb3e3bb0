"""The files are read again when they have changed; a bad one is told, and the old one holds."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from tests.helpers.aio import run

from helexa.cortex import reload
from helexa.cortex.reload import Files, Read, Reloader, Stamp, waiting

ONE = '[[neurons]]\nname = "a"\nendpoint = "http://a:1"\n'
TWO = ONE + '[[neurons]]\nname = "b"\nendpoint = "http://b:1"\n'


class Looks:
    """Files that tell their loop of each look at them.   before: what happens right before a look, in its thread."""

    def __init__(self, files: Files) -> None:
        self.config = files.config
        self.read = files.read
        self.before: Callable[[], object] = lambda: None
        self.number = 0
        self._files = files
        self._loop = asyncio.get_running_loop()
        self._seen = asyncio.Condition()

    def stamp(self, catalogue_path: Path | None) -> Stamp:
        self.before()
        asyncio.run_coroutine_threadsafe(self._count(), self._loop)
        return self._files.stamp(catalogue_path)

    async def _count(self) -> None:
        async with self._seen:
            self.number += 1
            self._seen.notify_all()

    async def go_on(self, more: int) -> None:
        """Until there were so many more."""
        until = self.number + more
        async with self._seen:
            await self._seen.wait_for(lambda: self.number >= until)


class Site:
    """A cortex.toml, and what was made of it."""

    def __init__(self, folder: Path, text: str = ONE) -> None:
        self.config = folder / "cortex.toml"
        self.models = folder / "models.toml"
        self.config.write_text(text)
        files = Files(self.config, {})
        read = files.read(lambda _: None)
        self.applied: list[Read] = []
        self.news = asyncio.Event()
        self.reloader = Reloader(files, read.settings, read.catalogue_path, self.apply, every_s=0.001)
        self.looks = Looks(files)
        self.reloader._files = self.looks  # type: ignore[assignment]

    def apply(self, read: Read) -> list[str]:
        self.applied.append(read)
        self.news.set()
        return []

    async def until_applied(self) -> Read:
        await self.news.wait()
        self.news.clear()
        return self.applied[-1]

    async def settled(self) -> None:
        """The reloader has looked at the files as they are now as often as it takes, and has done what it does."""
        await self.looks.go_on(5)  # one began before, two see the change, one stands behind a reading, one after it

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
            await site.settled()
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


@contextmanager
def absent(config: Path) -> Iterator[None]:
    away = config.rename(config.with_suffix(".away"))
    yield
    away.rename(config)


@contextmanager
def a_folder(config: Path) -> Iterator[None]:
    away = config.rename(config.with_suffix(".away"))
    config.mkdir()
    yield
    config.rmdir()
    away.rename(config)


@contextmanager
def no_file_can_be_opened(config: Path) -> Iterator[None]:
    """EMFILE, until it is over; the file itself is the new one already. A limit of the process would hold for the
    threads that other tests have left behind, too."""
    config.write_text(TWO)
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", Mock(side_effect=full))
        yield


@contextmanager
def no_thread_can_be_had(config: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "load_cortex", Mock(side_effect=RuntimeError("can't start new thread")))
        config.write_text(TWO)
        yield


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (absent, "there is no such file"),
        (a_folder, "cannot be read: Is a directory"),
        (no_file_can_be_opened, "cannot be read: Too many open files"),
        (no_thread_can_be_had, "can't start new thread"),
    ],
)
def test_whatever_keeps_the_files_from_being_read_is_told_until_it_is_over(
    tmp_path: Path, trouble: Callable[[Path], AbstractContextManager[None]], words: str
) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            standing = site.reloader.standing
            with trouble(site.config):
                while standing.error is None:
                    await site.looks.go_on(1)
                assert words in standing.error
                assert "the old ones hold" in standing.warnings()[0]
                assert site.applied == []
            await site.until_applied()  # though a file that was put back looks as it did
            assert standing.warnings() == []

    run(main())


def test_a_catalogue_that_comes_late_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            named = tmp_path / "elsewhere.toml"
            site.replace(site.config, f"[gateway]\nmodels_config = '{named}'\n{ONE}")
            await site.settled()
            assert "which is not there" in (site.reloader.standing.error or "")
            named.write_text("")  # an editor begins
            named.write_text('[[models]]\nid = "m"\n')
            assert [m.id for m in (await site.until_applied()).catalogue.models] == ["m"]

    run(main())


def test_a_faulty_state_is_told_once_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with watched(Site(tmp_path)) as site:
            site.replace(site.config, "[[neurons")
            await site.settled()
            await site.settled()

    run(main())
    assert capsys.readouterr().err.count("the files cannot be taken") == 1


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
            for _ in range(20):  # a look would be one of these
                await asyncio.to_thread(int)
            assert site.looks.number == 0
            site.reloader.at_once()
            assert len((await site.until_applied()).settings.neurons) == 2

    run(main())


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site(tmp_path)
        lines = TWO.splitlines(keepends=True)
        written: list[str] = []

        def write_a_line() -> None:
            if len(written) < len(lines):
                written.append(lines[len(written)])
                site.config.write_text("".join(written))

        site.looks.before = write_a_line
        async with watched(site):
            assert len((await site.until_applied()).settings.neurons) == 2
            await site.settled()
            assert (len(site.applied), site.reloader.standing.error) == (1, None)

    run(main())


def test_without_files_there_is_nothing_to_watch() -> None:
    files = Files(None, {"CORTEX_DRAIN_S": "3"})
    read = files.read(lambda _: None)
    assert (read.settings.drain_s, read.catalogue_path, files.stamp(None)) == (3, None, ())
    assert waiting(read.settings, read.settings) == []
