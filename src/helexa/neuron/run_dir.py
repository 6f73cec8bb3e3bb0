"""The private folder for the sockets of this daemon's hosts."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from helexa.core.private_folder import PrivateFolder
from helexa.core.settings_file import ConfigError, Problem

SUN_PATH: Final = 107  # bytes a Unix socket's path may have (108 with its NUL; unix(7))
PREFIX: Final = "helexa-"
LONGEST_NAME: Final = "999999.sock"


class RunDir:
    def __init__(self, wanted: str | None, env: Mapping[str, str]) -> None:
        """wanted: the setting run_dir; ConfigError where it cannot be used. Left out: the user's runtime folder, else
        /tmp."""
        self._numbers = itertools.count(1)
        self._folder = PrivateFolder(_base(wanted, env), PREFIX)
        self.path = self._folder.path

    def new_socket(self) -> Path:
        """A path that no other host of this daemon had."""
        return self.path / f"{next(self._numbers)}.sock"

    def remove(self) -> None:
        """Idempotent."""
        self._folder.remove()


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
