"""The private folder for the sockets of this daemon's hosts: 0700, locked while the daemon lives, gone after it.

A daemon that was killed leaves its folder behind; the next one sweeps it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from helexa.core.settings_file import ConfigError, Problem

SUN_PATH: Final = 107  # bytes a Unix socket's path may have (108 with its NUL; unix(7))
PREFIX: Final = "helexa-"
LOCK: Final = "lock"
LONGEST_NAME: Final = "999999.sock"
YOUNG_S: Final = 60  # a sibling that has just been made may not have its lock yet


class RunDir:
    def __init__(self, wanted: str | None, env: Mapping[str, str]) -> None:
        """wanted: the setting run_dir; ConfigError where it cannot be used. Left out: the user's runtime folder, else
        /tmp."""
        self._numbers = itertools.count(1)
        base = _base(wanted, env)
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # 0700, and nobody else's
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def new_socket(self) -> Path:
        """A path that no other host of this daemon had."""
        return self.path / f"{next(self._numbers)}.sock"

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _base(wanted: str | None, env: Mapping[str, str]) -> Path:
    if wanted is not None:
        base = Path(wanted).absolute()
        if not _short_enough(base):
            raise _unusable(f"{base} is too long: a socket's path may have {SUN_PATH} bytes; choose a shorter one")
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise _unusable(f"{base} cannot be made: {err.strerror}") from err
        if not os.access(base, os.W_OK | os.X_OK):
            raise _unusable(f"{base} cannot be written to by this user")
        return base
    runtime = env.get("XDG_RUNTIME_DIR")
    if runtime:
        base = Path(runtime) / "helexa"
        with contextlib.suppress(OSError):
            base.mkdir(mode=0o700, exist_ok=True)
        if _short_enough(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    return Path(tempfile.gettempdir() if _short_enough(Path(tempfile.gettempdir())) else "/tmp")


def _short_enough(base: Path) -> bool:
    return len(os.fsencode(base / f"{PREFIX}12345678" / LONGEST_NAME)) <= SUN_PATH


def _unusable(reason: str) -> ConfigError:
    return ConfigError([Problem("neuron.toml", "run_dir", reason)])


def _sweep(base: Path) -> None:
    """Remove what daemons of this user left that are gone: nobody holds the lock."""
    for folder in base.glob(PREFIX + "*"):
        try:
            stat = folder.lstat()
            if stat.st_uid != os.geteuid() or time.time() - stat.st_mtime < YOUNG_S or folder.is_symlink():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its daemon lives
        finally:
            os.close(lock)
