"""What a node is and how it is: the answers of GET /discovery and GET /health. Wire types only.

Memory is MB of 2^20. A field that is None is unknown, never zero, and is left out on the wire.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Device(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One GPU, or the CPU of a host without one (name "CPU ...", memory that of the host)."""

    index: int
    name: str
    kind: str | None = None  # "cuda" | "cpu" | "metal" | "rocm"
    uuid: str | None = None
    vram_total_mb: int | None = None
    compute_capability: str | None = None
    error: str | None = None  # why this device cannot be used, one sentence


class Discovery(msgspec.Struct, omit_defaults=True, kw_only=True):
    hostname: str
    os: str
    kernel: str
    cuda_version: str | None = None
    driver_version: str | None = None
    devices: list[Device] = []
    harnesses: list[str] = []
    isolation: str | None = None  # "process" | "none": then the node answers nothing while an engine loads in it
    error: str | None = None  # a driver/library mismatch, in one sentence

    # Written even when empty: the contract promises the lists.
    def to_wire(self) -> dict[str, Any]:
        wire: dict[str, Any] = msgspec.to_builtins(self)
        wire["devices"] = msgspec.to_builtins(self.devices)
        wire["harnesses"] = self.harnesses
        return wire


class DeviceHealth(msgspec.Struct, omit_defaults=True, kw_only=True):
    """vram_limit_mb: what models may have of it in all, where that is less than the device has."""

    index: int
    vram_used_mb: int | None = None
    vram_free_mb: int | None = None
    vram_limit_mb: int | None = None
    utilization_pct: float | None = None
    temp_c: float | None = None
    error: str | None = None


class NodeHealth(msgspec.Struct, kw_only=True):
    """status: "starting" (devices not known yet) | "ok" | "degraded" (a device is in error) | "draining"."""

    status: str
    uptime_secs: float
    devices: list[DeviceHealth] = []
