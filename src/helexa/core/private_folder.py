"""A private folder in a shared place (/tmp): 0700, locked while its process lives, gone after it.

A process that was killed leaves its folder behind; the next one with the same prefix sweeps it away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

LOCK: Final = "lock"
YOUNG_S: Final = 60  # a sibling that has just been made may not have its lock yet


class PrivateFolder:
    def __init__(self, base: Path, prefix: str) -> None:
        _sweep(base, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))  # 0700, and nobody else's
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _sweep(base: Path, prefix: str) -> None:
    """Remove what processes of this user left that are gone: nobody holds the lock."""
    for folder in base.glob(prefix + "*"):
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
            pass  # its process lives
        finally:
            os.close(lock)


def make(path: Path) -> None:
    """A lasting folder that only this user can enter: made so, or found so. Raises OSError where it is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    if found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"others may enter it; chmod 700 {path}", str(path))
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written to by this user", str(path))
