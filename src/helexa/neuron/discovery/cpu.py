"""The CPU as a device: its memory is the host's, or what control groups leave of it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from helexa.core.discovery import Device, DeviceHealth

MB: Final = 1 << 20
# cgroup v1 writes "no limit" as the largest multiple of a page below 2^63.
_NO_LIMIT: Final = 1 << 60
_SENSORS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


class Host:
    """root is "/" (or a tree of fixtures), pid the process whose control groups count."""

    def __init__(self, root: Path, pid: int) -> None:
        self._root = root
        self._groups = list(memory_groups(root, pid))
        psutil.cpu_percent(None)  # the first call only starts the measurement
        self.device = Device(index=0, name=cpu_name(root), kind="cpu", vram_total_mb=self._total() // MB)

    def health(self) -> list[DeviceHealth]:
        total = self._total()
        free = min([psutil.virtual_memory().available, *(left for group in self._groups for left in headroom(group))])
        return [
            DeviceHealth(
                index=0,
                vram_used_mb=max(total - free, 0) // MB,
                vram_free_mb=max(free, 0) // MB,
                utilization_pct=psutil.cpu_percent(None),
                temp_c=_temperature(),
            )
        ]

    def _total(self) -> int:
        limits = (limit for group in self._groups if (limit := group_limit(group)) is not None)
        return min([psutil.virtual_memory().total, *limits])


def cpu_name(root: Path) -> str:
    """ "CPU AMD Ryzen 9 7950X 16-Core Processor"; "CPU aarch64" where the kernel gives no model name."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return " ".join(f"CPU {model or platform.processor() or platform.machine()}".split())


def memory_groups(root: Path, pid: int) -> Iterator[Path]:
    """The folders of the control groups that bound this process's memory, innermost first (v2, or v1's memory)."""
    try:
        lines = (root / f"proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be the host's and not be there; the mount's own root then is our group.
        while group != base:
            if group.is_dir():
                yield group
            group = group.parent
        yield base


def group_limit(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        value = _number(group / name)
        if value is not None and value < _NO_LIMIT:
            return value
    return None


def headroom(group: Path) -> Iterator[int]:
    """Bytes that may still be taken in the group: its limit, less what is used and cannot be dropped."""
    limit = group_limit(group)
    used = next((u for name in ("memory.current", "memory.usage_in_bytes") if (u := _number(group / name))), None)
    if limit is None or used is None:
        return
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        stat = {}
    # Cached file pages are given back under pressure; only the inactive ones are counted on, as kubelet does.
    droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    yield limit - (used - droppable)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)  # not on macOS
    sensors = read() if read else {}
    return next((max(s.current for s in sensors[name]) for name in _SENSORS if sensors.get(name)), None)
