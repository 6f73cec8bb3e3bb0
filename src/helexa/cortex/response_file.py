"""Responses kept in a SQLite file, so that they outlive the gateway.

What is new is in memory at once and written by a thread of its own: the loop never waits for the disk. It only reads,
by key, what memory no longer has, which is tens of microseconds. What cannot be written now (the disk is full, no file
can be opened) stays in memory, within the bound of the file, and is tried again until it can. Nobody but the gateway's
user may read the file.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helexa.core import logs
from helexa.cortex.response_store import CannotKeep, MemoryStore, Record, not_found

log = logs.get("cortex.responses")

VERSION: Final = 1  # of the tables; PRAGMA user_version
_IN_MEMORY: Final = 8 << 20  # bytes of the latest responses that are not read from the file
_CLOSE_S: Final = 10.0
_AGAIN_S: Final = 2.0  # until what could not be written is tried again
_AT_ONCE: Final = 64  # rows that are deleted between two looks at the total

_TABLE: Final = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, input BLOB NOT NULL, response BLOB NOT NULL,
    size INTEGER NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX responses_used ON responses (used, id, size);
"""
_SELECT: Final = "SELECT id, owner, previous, input, response FROM responses WHERE id = ? AND used >= ?"
_PUT: Final = "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Change:
    """What the file does not know yet of one response.   record: None where the file has it.   used: when, seconds
    since 1970.   deleted: it is to go."""

    record: Record | None
    used: float
    deleted: bool = False


class FileStore:
    """A ResponseStore. max_bytes, age_s: as of MemoryStore.   clock: seconds since 1970. Raises CannotKeep."""

    def __init__(
        self, path: Path, *, max_bytes: int, age_s: float, clock: Callable[[], float], again_s: float = _AGAIN_S
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._age_s = age_s
        self._again_s = again_s
        self._clock = clock
        self._latest = MemoryStore(max_bytes=min(max_bytes, _IN_MEMORY), age_s=age_s, clock=clock)
        self._changed = threading.Condition()  # guards the next three
        self._changes: dict[str, Change] = {}  # the latest last
        self._unwritten = 0  # bytes of the records among them
        self._closing = False
        try:
            _make_private(path)
            self._reader = _open(path)
            _create(self._reader)
        except (OSError, sqlite3.Error) as err:
            raise CannotKeep(f"[responses] path = {str(path)!r} cannot be used: {err}") from err
        self._thread = threading.Thread(target=self._write, name="responses", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        if record.size > self._max_bytes:
            return
        self._latest.put(record)
        self._change(record.id, Change(record, self._clock()))

    def get(self, owner: str, response_id: str) -> Record | None:
        now = self._clock()
        record = self._latest.get(owner, response_id)
        if record is None:
            record = self._read(response_id, now)
            if record is None:
                return None
            if record.owner != owner:
                raise not_found("Response", response_id)
            self._latest.put(record)
        known = self._changes.get(response_id)
        self._change(response_id, Change(known.record if known is not None else None, now))
        return record

    def delete(self, owner: str, response_id: str) -> bool:
        if self.get(owner, response_id) is None:
            return False
        self._latest.delete(owner, response_id)
        self._change(response_id, Change(None, self._clock(), deleted=True))
        return True

    def close(self) -> None:
        """What was to be written is, where it can be."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)
        self._reader.close()

    def _change(self, response_id: str, change: Change) -> None:
        with self._changed:
            self._forget(response_id)
            self._changes[response_id] = change
            self._unwritten += change.record.size if change.record is not None else 0
            while self._unwritten > self._max_bytes:  # the file would not keep them either
                self._forget(next(name for name, known in self._changes.items() if known.record is not None))
            self._changed.notify()

    def _forget(self, response_id: str) -> None:
        known = self._changes.pop(response_id, None)
        if known is not None and known.record is not None:
            self._unwritten -= known.record.size

    def _read(self, response_id: str, now: float) -> Record | None:
        known = self._changes.get(response_id)
        if known is not None and (known.deleted or known.record is not None):
            return known.record if known.used >= now - self._age_s else None
        try:
            row = self._reader.execute(_SELECT, (response_id, now - self._age_s)).fetchone()
        except sqlite3.Error as err:
            log.warning("a kept response cannot be read", id=response_id, error=str(err))
            return None
        return Record(*row) if row is not None else None

    # the thread

    def _write(self) -> None:
        failing = False
        writer: sqlite3.Connection | None = None
        while (changes := self._next()) is not None:
            last = self._closing  # whoever closes waits for one try
            try:
                writer = writer or _open(self._path)
                with writer:  # a transaction
                    _carry_out(writer, changes, self._clock() - self._age_s, self._max_bytes)
            except (OSError, sqlite3.Error) as err:
                if not failing:
                    log.warning("responses cannot be kept in the file for now", path=str(self._path), error=str(err))
                failing = True
                if writer is not None:  # what it has open may be what is wrong
                    writer.close()
                    writer = None
                if last:
                    log.warning("responses were not kept in the file", path=str(self._path), number=len(changes))
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, self._again_s)
                continue
            if failing:
                log.info("responses are kept in the file again", path=str(self._path))
            failing = False
            with self._changed:
                for response_id, change in changes.items():
                    if self._changes.get(response_id) is change:
                        self._forget(response_id)
        if writer is not None:
            writer.close()

    def _next(self) -> dict[str, Change] | None:
        """All that the file does not know, as soon as there is something. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes or self._closing)
            return dict(self._changes) or None


def _carry_out(writer: sqlite3.Connection, changes: Mapping[str, Change], oldest: float, max_bytes: int) -> None:
    for response_id, change in changes.items():
        record = change.record
        if change.deleted:
            writer.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        elif record is None:
            writer.execute("UPDATE responses SET used = ? WHERE id = ?", (change.used, response_id))
        else:
            told = (record.id, record.owner, record.previous, record.input, record.response, record.size, change.used)
            writer.execute(_PUT, told)
    writer.execute("DELETE FROM responses WHERE used < ?", (oldest,))
    while True:
        (total,) = writer.execute("SELECT COALESCE(SUM(size), 0) FROM responses").fetchone()
        if total <= max_bytes:
            return
        # the least recently used, as many as take the excess away
        over, ids = total - max_bytes, []
        for response_id, size in writer.execute("SELECT id, size FROM responses ORDER BY used LIMIT ?", (_AT_ONCE,)):
            if over <= 0:
                break
            ids.append((response_id,))
            over -= size
        writer.executemany("DELETE FROM responses WHERE id = ?", ids)


def _make_private(path: Path) -> None:
    """Before SQLite opens it: its journal gets the same mode. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _create(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == VERSION:
        return
    if version or connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
        raise sqlite3.DatabaseError("it is not a file of this version's; name another, or remove it")
    connection.executescript(f"BEGIN; {_TABLE} PRAGMA user_version = {VERSION}; COMMIT;")
