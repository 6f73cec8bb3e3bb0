"""Child processes that never outlive us: each has a group of its own, and dies when its parent does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_TAIL_BYTES: Final = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """One program of ours. Start it from the main thread: the kernel's "parent" is the thread that spawned.

    log: where its stderr goes; None: our own.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path | None) -> None:
        self.name = name
        self._log = log
        parent = os.getpid()

        def before_exec() -> None:
            # Its own group, so that a Ctrl-C on the terminal is ours to pass on, in the right order.
            os.setpgid(0, 0)
            if sys.platform == "linux":
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
                if os.getppid() != parent:  # it died before the line above
                    os._exit(1)

        stderr = None if log is None else log.open("wb")
        try:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if stderr is None else stderr,
                stderr=stderr,
                preexec_fn=before_exec,
            )
        finally:
            if stderr is not None:
                stderr.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """The end of its log, for the reason of a death."""
        if self._log is None:
            return ""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-8:])

    def ask_to_end(self) -> None:
        if self.is_alive:
            self.process.terminate()

    def end(self, within_s: float) -> None:
        """SIGTERM, and after `within_s` SIGKILL for it and whatever it left in its group."""
        self.ask_to_end()
        deadline = time.monotonic() + within_s
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()
