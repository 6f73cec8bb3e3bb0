"""Responses kept in a SQLite file, so that they outlive the gateway.

What is new is in memory at once and written by a thread of its own: the loop never waits for the disk. It only reads,
by key, what memory no longer has, which is tens of microseconds. Nobody but the user of the gateway may read the file.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from helexa.core import logs
from helexa.cortex.response_store import CannotKeep, MemoryStore, Record, not_found

log = logs.get("cortex.responses")

VERSION: Final = 1  # of the tables; PRAGMA user_version
_IN_MEMORY: Final = 8 << 20  # bytes of the latest responses that are not read from the file
_CLOSE_S: Final = 10.0
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

Job = Callable[[sqlite3.Connection], None]


class FileStore:
    """A ResponseStore. max_bytes, age_s: as of MemoryStore.   clock: seconds since 1970. Raises CannotKeep."""

    def __init__(self, path: Path, *, max_bytes: int, age_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._age_s = age_s
        self._clock = clock
        self._latest = MemoryStore(max_bytes=min(max_bytes, _IN_MEMORY), age_s=age_s, clock=clock)
        self._deleting: set[str] = set()  # by the thread, which has not come to it yet
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        try:
            _make_private(path)
            self._reader = _open(path)
            _create(self._reader)
        except (OSError, sqlite3.Error) as err:
            raise CannotKeep(f"[responses] path = {str(path)!r} cannot be used: {err}") from err
        self._thread = threading.Thread(target=self._write, args=(path,), name="responses", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        if record.size > self._max_bytes:
            return
        self._latest.put(record)
        used = self._clock()
        row = (record.id, record.owner, record.previous, record.input, record.response, record.size, used)
        self._jobs.put(lambda writer: _put(writer, row, used - self._age_s, self._max_bytes))

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
        self._jobs.put(lambda writer: _use(writer, response_id, now))
        return record

    def delete(self, owner: str, response_id: str) -> bool:
        if self.get(owner, response_id) is None:
            return False
        self._latest.delete(owner, response_id)
        self._deleting.add(response_id)
        self._jobs.put(lambda writer: self._delete(writer, response_id))
        return True

    def close(self) -> None:
        """What was to be written is."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_S)
        self._reader.close()

    def _read(self, response_id: str, now: float) -> Record | None:
        if response_id in self._deleting:
            return None
        try:
            row = self._reader.execute(_SELECT, (response_id, now - self._age_s)).fetchone()
        except sqlite3.Error as err:
            log.warning("a kept response cannot be read", id=response_id, error=str(err))
            return None
        return Record(*row) if row is not None else None

    # the thread

    def _write(self, path: Path) -> None:
        writer = _open(path)
        while (job := self._jobs.get()) is not None:
            try:
                with writer:  # a transaction
                    job(writer)
            except sqlite3.Error as err:
                log.warning("responses cannot be kept in the file", path=str(path), error=str(err))
        writer.close()

    def _delete(self, writer: sqlite3.Connection, response_id: str) -> None:
        writer.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        writer.commit()
        self._deleting.discard(response_id)


def _put(writer: sqlite3.Connection, row: tuple[object, ...], oldest: float, max_bytes: int) -> None:
    writer.execute(_PUT, row)
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


def _use(writer: sqlite3.Connection, response_id: str, now: float) -> None:
    writer.execute("UPDATE responses SET used = ? WHERE id = ?", (now, response_id))


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
