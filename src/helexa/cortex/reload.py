"""The files that a gateway was started from, read again when they change, and at SIGHUP.

What is in them takes effect as a whole or not at all: whatever keeps them from being read is told, the gateway goes on
with what it had, and looks again. Nodes and models change while it runs; of other settings it is told that they wait
for a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from helexa.core import logs
from helexa.core.catalogue import Catalogue, load_catalogue
from helexa.core.config import ConfigError, CortexSettings, find_catalogue, load_cortex

log = logs.get("cortex.reload")

EVERY_S: Final = 1.0
_APPLIED: Final = frozenset({"neurons"})  # what takes effect without a restart; models.toml does as a whole

Stamp = tuple[tuple[int, int, int] | None, ...]  # of each file: when it changed, its size, which it is


@dataclass(frozen=True, slots=True)
class Read:
    settings: CortexSettings
    catalogue: Catalogue
    catalogue_path: Path | None


@dataclass(frozen=True, slots=True)
class Files:
    """config: cortex.toml; None: nothing but defaults and variables, and nothing to read again. models: in place of the
    models.toml that it names. override: what the command line says beside it."""

    config: Path | None
    env: Mapping[str, str]
    models: Path | None = None
    override: Callable[[CortexSettings], CortexSettings] = lambda settings: settings

    def read(self, warn: Callable[[str], None]) -> Read:
        """Raises ConfigError."""
        settings = load_cortex(self.config, self.env, warn)
        path = self.models or find_catalogue(settings, self.config)
        catalogue = Catalogue() if path is None else load_catalogue(path, warn)
        return Read(self.override(settings), catalogue, path)

    def stamp(self, catalogue_path: Path | None) -> Stamp:
        """Changes with each change of either file; a catalogue may also come or go beside cortex.toml."""
        if self.config is None:
            return ()
        return tuple(_stamp(path) for path in (self.config, _looked_at(self.config, catalogue_path)))


@dataclass(slots=True)
class Standing:
    """What is known of the files, for /health and `cortex status`. error: why the latest could not be taken.
    restart_for: settings that have changed in the file and not here."""

    catalogue_path: Path | None
    error: str | None = None
    restart_for: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        said = []
        if self.error is not None:
            said.append(f"The files have changed and cannot be taken; the old ones hold. {self.error}")
        if self.restart_for:
            said.append(f"cortex.toml has changed; these wait for a restart: {', '.join(self.restart_for)}.")
        return said


class Reloader:
    """apply: makes of the fleet what was read, on the loop; returns what has changed, in words."""

    def __init__(
        self,
        files: Files,
        settings: CortexSettings,
        catalogue_path: Path | None,
        apply: Callable[[Read], list[str]],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self.standing = Standing(catalogue_path)
        self._files = files
        self._settings = settings
        self._apply = apply
        self._every_s = every_s
        self._now = asyncio.Event()
        self._stamp = files.stamp(catalogue_path)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks at the files from now on, where there are any."""
        if self._files.config is not None:
            self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def at_once(self) -> None:
        """At SIGHUP: whether they seem to have changed or not."""
        self._now.set()

    async def _watch(self) -> None:
        every_s = self._every_s if self._settings.gateway.watch_files else None
        seen = self._stamp
        while True:
            try:
                async with asyncio.timeout(every_s):
                    await self._now.wait()
            except TimeoutError:
                pass
            asked = self._now.is_set()
            self._now.clear()
            try:
                stamp = await asyncio.to_thread(self._files.stamp, self.standing.catalogue_path)
                # One look later it must be the same: an editor may not be done writing. What could not be read may be
                # readable now though it looks the same.
                changed = stamp == seen and (stamp != self._stamp or self.standing.error is not None)
                seen = stamp
                if asked or changed:
                    self._stamp = stamp
                    await self._read(asked=asked)
            except ConfigError as err:
                self._not_taken(str(err))
            except Exception as err:  # no thread to be had, a folder that may not be searched, a fault of ours
                self._not_taken(f"{self._files.config}: {err}", exc_info=True)

    def _not_taken(self, error: str, *, exc_info: bool = False) -> None:
        if error != self.standing.error:
            log.error("the files cannot be taken; the old ones hold", error=error, exc_info=exc_info)
        self.standing.error = error

    async def _read(self, *, asked: bool) -> None:
        warned: list[str] = []
        read = await asyncio.to_thread(self._files.read, warned.append)
        config, before = self._files.config, self.standing.catalogue_path
        self.standing.catalogue_path = read.catalogue_path
        if config is not None and _looked_at(config, read.catalogue_path) != _looked_at(config, before):
            self._stamp = ()  # of a file that was not looked at before it was read, and may be half written
            if not asked:
                return
        for warning in warned:
            log.warning(warning)
        changed = self._apply(read)
        self.standing.error = None
        self.standing.restart_for = waiting(self._settings, read.settings)
        log.info("the files were read again", changed=changed, restart_for=self.standing.restart_for)


def waiting(old: CortexSettings, new: CortexSettings) -> list[str]:
    """Settings that differ and take effect only with a restart, as cortex.toml calls them."""
    found = []
    for name in CortexSettings.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if name in _APPLIED or before == after:
            continue
        if isinstance(before, msgspec.Struct):
            keys = [key for key in before.__struct_fields__ if getattr(before, key) != getattr(after, key)]
            found += [f"[{name}] {key}" for key in keys if (name, key) != ("gateway", "models_config")]
        else:
            found.append(name)
    return found


def _looked_at(config: Path, catalogue_path: Path | None) -> Path:
    """The catalogue, or where one may come."""
    return (catalogue_path or config.parent / "models.toml").absolute()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size, seen.st_ino
