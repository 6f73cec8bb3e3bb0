"""Fetching files of one repository into the cache: resumed, verified, and cancelled without loss. Blocking.

A blob has one writer among all processes (flock). What was received stays as <hash>.incomplete, whatever ends the
download, and the next one goes on from there; only what has the right hash gets the final name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from helexa.core.errors import HelexaError, LoadFailed, NeverLoads
from helexa.core.lifecycle import Progress
from helexa.neuron.store import http
from helexa.neuron.store.cache import HubCache, HubFile
from helexa.neuron.store.hub import Hub, Listing, retry_delay

MB: Final = 1 << 20
_CHUNK: Final = 256 << 10
# A content network may refuse to send more than 50 GB in one answer (huggingface_hub's MAX_HTTP_DOWNLOAD_SIZE);
# a range of it is always sent.
_SLICE: Final = 16 << 30
_ATTEMPTS_WITHOUT_PROGRESS: Final = 6
_REPORT_EVERY_S: Final = 0.25
_SPARE_DISK: Final = 64 << 20  # what is left for others, and for directories

Report = Callable[[Progress], None]


class Download:
    """Some files of a repository. `run` is called once, in a thread; `cancel` from any other.

    distrust: what is in the cache already is hashed too, because it was found damaged.
    """

    def __init__(
        self,
        hub: Hub,
        cache: HubCache,
        listing: Listing,
        files: Sequence[HubFile],
        report: Report,
        *,
        distrust: bool = False,
    ) -> None:
        self._hub = hub
        self._cache = cache
        self._listing = listing
        self._files = files
        self._distrust = distrust
        self._cancel = http.Cancel()
        self._meter = Meter(sum(f.size for f in files), report)

    def cancel(self) -> None:
        self._cancel.cancel()

    def run(self) -> list[Path]:
        """Paths in the snapshot, in the order of the files. Raises HelexaError, or Cancelled."""
        listing, cache = self._listing, self._cache
        try:
            for file in self._files:
                if not file.blob:
                    raise LoadFailed(f"the Hub gives no hash for {file.name} of {listing.repo}; it is not fetched")
            self._check_space()
            paths = []
            done = 0
            for file in self._files:
                self._fetch(file, done)
                done += file.size
                paths.append(cache.link(listing.repo, listing.commit, file))
            cache.keep_tree(listing.repo, listing.commit, listing.files)
            cache.keep_ref(listing.repo, "main", listing.commit)
        except OSError as err:
            raise self._disk_error(err) from err
        self._meter.finish()
        return paths

    def _check_space(self) -> None:
        repo = self._listing.repo
        missing = [f for f in {f.blob: f for f in self._files}.values() if not self._cache.has(repo, f)]
        need = sum(f.size - _size(self._cache.partial(repo, f)) for f in missing)
        self._cache.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache.root).free - _SPARE_DISK
        if need > free:
            raise self._no_space(need, free)

    def _no_space(self, need: int, free: int) -> NeverLoads:
        need_mb, free_mb = -(-need // MB), max(free, 0) // MB
        return NeverLoads(
            f"{self._listing.repo} needs {need_mb} MB of disk and {self._cache.root} has {free_mb} MB free: remove "
            "models (`neuron models`, `neuron rm`), or set HF_HOME to a larger disk",
            code="insufficient_disk",
            details={"need_mb": need_mb, "free_mb": free_mb},
        )

    def _disk_error(self, err: OSError) -> HelexaError:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            left = sum(f.size for f in self._files if not self._cache.has(self._listing.repo, f))
            return self._no_space(left, shutil.disk_usage(self._cache.root).free)
        return LoadFailed(
            f"{self._listing.repo} cannot be stored in {self._cache.root}: {err.strerror or err} "
            "(HF_HOME says where it goes)"
        )

    def _fetch(self, file: HubFile, before: int) -> None:
        repo = self._listing.repo
        if self._distrust:
            self._drop_damaged(file)
        if self._cache.has(repo, file):
            self._meter.resumed(before + file.size)
            return
        partial = self._cache.partial(repo, file)

        def wait(seconds: float) -> bool:
            self._meter.at(before + _size(partial))  # another process is fetching it
            return self._cancel.wait(seconds)

        with self._cache.lock(repo, file, wait):
            if self._cache.has(repo, file):
                self._meter.resumed(before + file.size)
                return
            partial.parent.mkdir(parents=True, exist_ok=True)
            for last_try in (False, True):
                wrong = self._receive(file, partial, before)
                if wrong is None:
                    break
                partial.unlink()
                if last_try:
                    raise LoadFailed(
                        f"{file.name} of {repo} arrives damaged, twice ({wrong}); a proxy on the way may change it"
                    )
            os.replace(partial, self._cache.blob(repo, file))

    def _drop_damaged(self, file: HubFile) -> None:
        blob = self._cache.blob(self._listing.repo, file)
        try:
            with blob.open("rb") as have:
                part = Partial(file, have, self._cancel)
        except FileNotFoundError:
            return
        if part.wrong() is not None:
            blob.unlink()

    def _receive(self, file: HubFile, path: Path, before: int) -> str | None:
        """Bring the partial file to its full size; None if it then has the right hash, else what is wrong."""
        with path.open("ab+") as out:
            out.seek(0)
            part = Partial(file, out, self._cancel)
            if part.have > file.size:
                return part.wrong()
            self._meter.resumed(before + part.have)
            failures = 0
            while part.have < file.size:
                had = part.have
                trouble = self._receive_slice(file, part, before)
                if trouble is None:
                    continue
                failures = 1 if part.have > had else failures + 1
                if failures >= _ATTEMPTS_WITHOUT_PROGRESS:
                    raise LoadFailed(
                        f"the download of {file.name} from {self._listing.repo} broke off at {part.have} of "
                        f"{file.size} bytes ({trouble.what}); ask again to go on from there",
                        retry_after_s=30,
                    )
                self._cancel.wait(retry_delay(failures - 1, self._hub.backoff_s, trouble.retry_after))
            os.fsync(out.fileno())
        return part.wrong()

    def _receive_slice(self, file: HubFile, part: Partial, before: int) -> _Trouble | None:
        """One request's worth; None when all of it came."""
        end = min(file.size, part.have + _SLICE)
        try:
            with self._hub.open(self._listing, file, part.have, end, self._cancel) as response:
                if error := self._hub.refused(self._listing.repo, response.status, response.headers):
                    raise error
                if response.status == 200:  # ranges are not known here: the whole file, from the beginning
                    part.restart()
                    end = file.size
                elif response.status != 206:
                    return _Trouble(f"status {response.status}", response.headers.get("Retry-After"))
                elif not starts_at(response.headers.get("Content-Range"), part.have):
                    return _Trouble("another range came than was asked for")
                while part.have < end and (data := response.read_some(min(_CHUNK, end - part.have))):
                    part.append(data)
                    self._meter.at(before + part.have)
        except (http.Broken, http.Unreachable) as err:
            return _Trouble(str(err))
        return None if part.have == end else _Trouble("the connection ended")


@dataclass(frozen=True, slots=True)
class _Trouble:
    what: str
    retry_after: str | None = None


class Partial:
    """A file on its way: what of it is on disk, and the digest of that. Starts with what an earlier run received."""

    def __init__(self, file: HubFile, disk: BinaryIO, cancel: http.Cancel) -> None:
        self._file = file
        self._disk = disk
        self._digest = new_digest(file)
        self.have = 0
        while data := disk.read(_CHUNK):
            cancel.check()
            self._digest.update(data)
            self.have += len(data)

    def append(self, data: bytes) -> None:
        self._disk.write(data)
        self._digest.update(data)
        self.have += len(data)

    def restart(self) -> None:
        if self.have:
            self._disk.truncate(0)
            self._digest = new_digest(self._file)
            self.have = 0

    def wrong(self) -> str | None:
        """Why this is not the file; None if it is."""
        if self.have != self._file.size:
            return f"{self.have} bytes instead of {self._file.size}"
        found = self._digest.hexdigest()
        return None if found == self._file.blob else f"hash {found[:12]}... instead of {self._file.blob[:12]}..."


class Meter:
    """Counts bytes and tells of them a few times a second."""

    def __init__(self, total: int, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = total
        self._report = report
        self._done = 0
        self._received = 0  # in this run: what the rate is of
        self._began = clock()
        self._told = self._began - _REPORT_EVERY_S

    def resumed(self, done: int) -> None:
        """Position without having received anything."""
        self._done = done
        self._tell()

    def at(self, done: int) -> None:
        self._received += max(done - self._done, 0)
        self._done = done
        if self._clock() - self._told >= _REPORT_EVERY_S:
            self._tell()

    def finish(self) -> None:
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        self._told = now = self._clock()
        elapsed = now - self._began
        left = self._total - self._done
        rate = self._received / elapsed if elapsed > 1 else 0
        self._report(
            Progress(
                phase="downloading",
                fraction=self._done / self._total if self._total else None,
                bytes_done=self._done,
                bytes_total=self._total,
                eta_seconds=round(left / rate, 1) if rate and left > 0 else None,
            )
        )


def new_digest(file: HubFile) -> Any:
    """sha256 of files in large storage, git's blob hash of the others."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def starts_at(content_range: str | None, start: int) -> bool:
    """ "bytes 5-9/10" starts at 5. A 206 must say what it is (RFC 9110, 15.3.7)."""
    return (content_range or "").startswith(f"bytes {start}-")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
