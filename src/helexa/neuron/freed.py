"""Freed memory, given back to the system: glibc keeps it otherwise."""

from __future__ import annotations

import ctypes
import gc
from typing import Final

_libc: Final = ctypes.CDLL(None)


def give_back_freed() -> None:
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
