"""Records what is asked of this gateway as a trace that `cortex simulate --trace` plays: when, which model, how many
tokens, and ids of the prompt's prefixes. Never a word of a prompt, and ids that say nothing outside of the file.

Lines are made and written by a thread; the loop hands over what ended within a second. A disk that is full is told
once, and costs the trace some lines and the requests nothing. The file is its owner's alone.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from helexa.core import logs
from helexa.core.relay.contract import Exchange
from helexa.cortex.prefixes import Prompt
from helexa.cortex.simulate.trace import Request

log = logs.get("cortex.trace")

BACKLOG: Final = 64  # seconds of requests that may wait for a slow disk; what comes then is left out
_TOKEN_BYTES: Final = 4.0  # where a request ended before anybody counted its tokens
_TAIL: Final = 65_536

_encode = msgspec.json.Encoder().encode


class CannotRecord(Exception):
    """The trace cannot be written; str() is the whole message for the user."""


class TraceRecorder:
    """One file, and beside it `.1`, what it was before it had grown to max_bytes. wall: seconds since 1970;
    clock: the one that stamps exchanges. Raises CannotRecord where the file cannot be had."""

    def __init__(self, path: Path, *, max_bytes: int, wall: Callable[[], float], clock: Callable[[], float]) -> None:
        self._file = TraceFile(path, max_bytes)
        self._since = wall() - clock()
        # Of a prompt that somebody guesses, the id cannot be looked up: it is another one with each start.
        self._salt = secrets.randbits(64)
        self._ended: list[Request] = []
        self._batches: queue.Queue[Sequence[Request] | None] = queue.Queue(BACKLOG)
        self._is_behind = False
        self._thread = threading.Thread(target=self._write_all, name="trace", daemon=True)
        self._thread.start()

    def add(self, exchange: Exchange, model_id: str, prompt: Prompt | None) -> None:
        """Once per request, at its end; nothing is written here."""
        usage, salt = exchange.usage, self._salt
        prefix = [xxhash.xxh3_64_intdigest(h.to_bytes(8, "little"), salt) for h in prompt.hashes] if prompt else ()
        tokens = usage.prompt_tokens if usage is not None else round(prompt.weight / _TOKEN_BYTES) if prompt else 0
        ends = [round(tokens * end / prompt.weight) for end in prompt.ends] if prompt else ()
        self._ended.append(
            Request(
                round(self._since + exchange.t_start, 3),
                model_id,
                tokens,
                usage.completion_tokens if usage is not None else 0,
                prefix,
                ends,
            )
        )

    def flush(self, _loop_time: float = 0.0) -> None:
        """The server's on_tick: hands over to the thread, and never waits for it."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        try:
            self._batches.put_nowait(ended)
        except queue.Full:
            if not self._is_behind:
                log.warning("the trace's disk is too slow; requests are left out of the trace")
            self._is_behind = True
        else:
            self._is_behind = False

    def close(self, within_s: float = 5.0) -> None:
        """What is at hand is written, if the disk lets it be within that time."""
        self.flush()
        try:
            self._batches.put(None, timeout=within_s)
        except queue.Full:
            return
        self._thread.join(within_s)

    def _write_all(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._file.append(b"".join([_encode(request) + b"\n" for request in batch]))
        self._file.close()


class TraceFile:
    """Whole lines, or none of a batch. All calls come from one thread."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.failed = False
        try:
            self._fd = _open(path)
            self._size = _whole_lines(self._fd)
        except OSError as err:
            raise CannotRecord(f"[trace] path = {path} cannot be written ({err.strerror or err})") from err

    def append(self, lines: bytes) -> None:
        try:
            if self._size and self._size + len(lines) > self.max_bytes:
                self._turn()
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as err:
            if not self.failed:
                log.error(
                    "the trace cannot be written; requests are left out of it", path=str(self.path), error=str(err)
                )
            self.failed = True
            self._cut()
            return
        self._size += len(lines)
        if self.failed:
            log.info("the trace is written again", path=str(self.path))
        self.failed = False

    def close(self) -> None:
        os.close(self._fd)

    def _turn(self) -> None:
        """Begins anew; what there was is kept as the one file of before."""
        try:
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
        except FileNotFoundError:
            pass  # somebody else has moved it, or there was no descriptor left to open the next one with
        fd = _open(self.path)
        os.close(self._fd)
        self._fd, self._size = fd, 0

    def _cut(self) -> None:
        """Half a line would spoil the next one."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            pass


def _open(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _whole_lines(fd: int) -> int:
    """The file's size without half a line that a process left when it was killed."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, min(size, _TAIL), max(0, size - _TAIL))
    if tail and not tail.endswith(b"\n"):
        size -= len(tail) - (tail.rfind(b"\n") + 1)
        os.ftruncate(fd, size)
    return size
