"""What the kernel says of a process, from /proc: memory, bytes read, processor time. A few tens of microseconds.

While an engine holds its interpreter during a load, and when it is stuck, this is the only witness. Everything is
None where there is no /proc or no such process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_KB_FIELDS: Final = (b"RssAnon:", b"RssFile:", b"RssShmem:")


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes. `mapped` are pages of files, weights above all, that the kernel would call available."""

    own: int
    mapped: int

    @property
    def total(self) -> int:
        return self.own + self.mapped


def memory(pid: int) -> Memory | None:
    status = _read(pid, "status")
    if status is None:
        return None
    kb = dict.fromkeys(_KB_FIELDS, 0)
    for line in status.splitlines():
        name, _, rest = line.partition(b"\t")
        if name in kb:
            kb[name] = int(rest.split()[0])
    anonymous, mapped, shared = kb.values()
    return Memory(own=(anonymous + shared) << 10, mapped=mapped << 10)


def bytes_read(pid: int) -> int | None:
    """Through read(2), from cache or disk alike; pages of a mapping are not in it."""
    counters = _read(pid, "io")
    if counters is None or not counters.startswith(b"rchar: "):
        return None
    return int(counters[7 : counters.index(b"\n")])


def cpu_s(pid: int, thread: int | None = None) -> float | None:
    """Processor time of all its threads, or of one."""
    stat = _read(pid, "stat" if thread is None else f"task/{thread}/stat")
    if stat is None:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def parent(pid: int) -> int | None:
    stat = _read(pid, "stat")
    return None if stat is None else int(stat[stat.rindex(b")") + 2 :].split()[1])


def _read(pid: int, name: str) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return None
