"""The folder of saved prompt caches. The disk is the truth: daemons of one user may share the folder, `neuron rm` may
remove from it, and what is lost there costs a prefill and nothing else.

    <name>.kv      a state, as the engine wrote it
    <name>.json    what it is, with its checksum (states.State); renamed into place last, so that it vouches for a whole
    <name>.part    being written

Every method reads the disk, and is called in a thread.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from helexa.core import logs, private_folder
from helexa.core.config import NeuronSettings
from helexa.core.settings_file import ConfigError, Problem
from helexa.neuron.kv import states
from helexa.neuron.kv.states import State

_log = logs.get("neuron.kv")

MB: Final = 1 << 20
READ_BYTES: Final = 4 << 20
DISK_RESERVE: Final = 512 * MB  # left to everybody else
ABANDONED_S: Final = 600.0  # a part that has not grown for so long is nobody's any more
_decode = msgspec.json.Decoder(State).decode


@dataclass(frozen=True, slots=True)
class Figures:
    """size_bytes and states as last looked at; the rest since the start."""

    size_bytes: int = 0
    states: int = 0
    saved: int = 0
    restored: int = 0
    dropped: int = 0


class KvStore:
    def __init__(self, folder: Path, *, limit_mb: int, max_age_s: float, now: Callable[[], float] = time.time) -> None:
        """Raises OSError where the folder cannot be made, or is open to others."""
        private_folder.make(folder)
        self.folder = folder
        self.saved = self.restored = self.dropped = 0
        self._limit_bytes = limit_mb * MB
        self._max_age_s = max_age_s
        self._now = now
        self._size = self._count = 0
        self._told = False
        self._lock = threading.Lock()  # of those who look and then remove

    @property
    def figures(self) -> Figures:
        return Figures(self._size, self._count, self.saved, self.restored, self.dropped)

    def path_of(self, state: State) -> Path:
        return self.folder / f"{state.name}.kv"

    def sweep(self) -> None:
        """Remove what is too old, too much, or was never finished."""
        with self._lock:
            self._remove(
                states.surplus(self._scan(), now=self._now(), limit_bytes=self._limit_bytes, max_age_s=self._max_age_s)
            )
            left, unread = self._look()
            known = {state.name for state in left} | unread
            for path in self.folder.iterdir():
                with suppress(OSError):  # another daemon may have been faster
                    young = time.time() - path.stat().st_mtime < ABANDONED_S
                    if path.suffix in (".kv", ".part", ".json") and path.stem not in known and not young:
                        path.unlink()

    def find(self, key: str, model_id: str) -> list[State]:
        """What may be restored, not verified yet, the last used first. What is of this model and matches not, goes."""
        self.sweep()
        with self._lock:
            self._remove(states.outdated(self._scan(), key, model_id))
            return states.matching(self._scan(), key)

    def is_sound(self, state: State) -> bool:
        """Whether its file is, byte for byte, what was written."""
        try:
            return _checksum(self.path_of(state)) == state.checksum
        except OSError:
            return False

    def begin(self, size_bytes: float) -> Path | None:
        """A file to write about so much into; None where it would not fit."""
        if size_bytes > self._limit_bytes:
            return None
        try:
            short = size_bytes + DISK_RESERVE - shutil.disk_usage(self.folder).free
            if short > 0:
                self.failed(f"{short / 1e6:,.0f} MB more would have to be free on this disk")
                return None
            fd, part = tempfile.mkstemp(suffix=".part", prefix="new-", dir=self.folder)  # 0600
        except OSError as err:
            self.failed(str(err))
            return None
        os.close(fd)
        return Path(part)

    def commit(self, part: Path, key: str, describe: Callable[[str, int, str], State]) -> State:
        """The part becomes a state, and what it makes superfluous goes. describe(name, size_bytes, checksum).

        Raises OSError; then nothing has changed.
        """
        state = describe(f"{key[:16]}-{secrets.token_hex(6)}", part.stat().st_size, _checksum(part))
        fd, beside = tempfile.mkstemp(suffix=".part", prefix="new-", dir=self.folder)
        try:
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode(state))
            os.replace(part, self.path_of(state))
            os.replace(beside, self.folder / f"{state.name}.json")
        except OSError:
            self.path_of(state).unlink(missing_ok=True)
            raise
        finally:
            Path(beside).unlink(missing_ok=True)
        self.saved += 1
        self._told = False
        self.sweep()
        return state

    def drop(self, state: State) -> None:
        with self._lock:
            self._remove([state])
            self._scan()

    def forget(self, files: Collection[Path]) -> int:
        """Remove the states of a model of which these files are gone; how many there were."""
        names = {str(path) for path in files}
        with self._lock:
            gone = [state for state in self._scan() if names.intersection(state.files)]
            self._remove(gone)
        return len(gone)

    def clear(self) -> None:
        with self._lock:
            self._remove(self._scan())

    def failed(self, reason: str) -> None:
        """Told once, until a state could be written again."""
        if not self._told:
            _log.warning("prompt caches are not saved", folder=str(self.folder), reason=reason)
        self._told = True

    def _scan(self) -> list[State]:
        return self._look()[0]

    def _look(self) -> tuple[list[State], set[str]]:
        """The states, and the names of those that could not be read (too many open files, an error of the disk): what
        they are is not known, so they stay. What describes no whole state goes."""
        found, unread = [], set()
        for path in self.folder.glob("*.json"):
            try:
                state = _decode(path.read_bytes())
                whole = state.name == path.stem and self.path_of(state).stat().st_size == state.size_bytes
            except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
                whole = False
            except OSError:
                unread.add(path.stem)
                continue
            if whole:
                found.append(state)
                continue
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._size, self._count = sum(state.size_bytes for state in found), len(found)
        return found, unread

    def _remove(self, gone: Collection[State]) -> None:
        """The description first: what is left without one is nobody's."""
        for state in gone:
            (self.folder / f"{state.name}.json").unlink(missing_ok=True)
            self.path_of(state).unlink(missing_ok=True)
            self.dropped += 1


def open_store(settings: NeuronSettings, env: Mapping[str, str]) -> KvStore | None:
    """None where it is turned off, or where this user has no place for it. Raises ConfigError for a named folder that
    cannot be used."""
    folder = folder_of(settings, env)
    if folder is None or (not settings.kv_store and not folder.is_dir()):
        return None
    try:
        store = KvStore(folder, limit_mb=settings.kv_store_limit_mb, max_age_s=settings.kv_store_max_age_s)
    except OSError as err:
        reason = f"{folder} cannot be used: {err.strerror or err}"
        if settings.kv_store and settings.kv_store_dir is not None:
            raise ConfigError([Problem("neuron.toml", "kv_store_dir", reason)]) from err
        if settings.kv_store:
            _log.warning("prompt caches do not survive a swap", reason=reason)
        return None
    if settings.kv_store:
        return store
    store.clear()  # who turns it off does not want yesterday's conversations on the disk either
    return None


def folder_of(settings: NeuronSettings, env: Mapping[str, str]) -> Path | None:
    """As set, else in the cache folder of the service or of the user; None where there is none."""
    if settings.kv_store_dir is not None:
        return Path(settings.kv_store_dir).expanduser().absolute()
    if service := env.get("CACHE_DIRECTORY"):  # systemd.exec(5); several are joined by colons
        return Path(service.partition(":")[0]) / "kv"
    cache = env.get("XDG_CACHE_HOME") or (f"{env['HOME']}/.cache" if env.get("HOME") else None)
    return Path(cache) / "helexa" / "kv" if cache else None


def _checksum(path: Path) -> str:
    """13 GB/s from memory, measured: a fraction of what the engine takes to read the same."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
