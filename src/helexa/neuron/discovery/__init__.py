"""What this host computes with: NVIDIA GPUs through NVML, else through `nvidia-smi`, else the CPU as one device.

Reading is here and in the modules below; what a reading means for a load is decided elsewhere. Nothing raises: what
cannot be used carries its reason, and what is unknown is None.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from helexa.core.discovery import Device, DeviceHealth, Discovery
from helexa.neuron.discovery import cpu, nvml, smi
from helexa.neuron.discovery.faults import MISMATCH, DriverMismatch, NoGpu


@dataclass(frozen=True, slots=True)
class Reading:
    """What one way of looking found, and how to look again."""

    devices: list[Device]
    health: Callable[[], list[DeviceHealth]]
    process_mb: Callable[[int], dict[int, int]] = lambda pid: {}
    close: Callable[[], None] = lambda: None
    driver_version: str | None = None
    cuda_version: str | None = None
    error: str | None = None
    refuse_loads: str | None = None


class Probe:
    """This host's devices. `discovery` is fixed at the start; `health` reads anew and may block some milliseconds."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.refuse_loads = reading.refuse_loads

    def discovery(self) -> Discovery:
        reading = self._reading
        return Discovery(
            hostname=platform.node(),
            os=platform.system().lower(),
            kernel=platform.release(),
            cuda_version=reading.cuda_version,
            driver_version=reading.driver_version,
            devices=reading.devices,
            error=reading.error,
        )

    def health(self) -> list[DeviceHealth]:
        """One entry per device of `discovery`, in its order. Called in a thread, one call at a time."""
        return self._reading.health()

    def process_mb(self, pid: int) -> dict[int, int]:
        """Device index -> MB that this process holds there; devices where that is unknown (on the CPU, in another
        PID namespace) are left out. May block; called in a thread."""
        return self._reading.process_mb(pid)

    def close(self) -> None:
        self._reading.close()


def discover(*, load_nvml: Callable[[], Any] = nvml.load, root: Path = Path("/")) -> Probe:
    """NVML, else `nvidia-smi`, else the CPU; never raises. root is where /proc and /sys are."""
    why: list[str] = []
    ways: tuple[Callable[[], Reading], ...] = (partial(_through_nvml, load_nvml), _through_smi)
    for look in ways:
        try:
            return Probe(look())
        except DriverMismatch:
            return Probe(_mismatched(root))
        except NoGpu as err:
            why.append(str(err))
    return Probe(_on_cpu(root, why[0] if has_nvidia_card(root) else None))


def has_nvidia_card(root: Path) -> bool:
    """A display controller (PCI class 03) of NVIDIA is in the machine, whatever its driver does."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            pci_class = (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and pci_class.startswith("0x03"):
            return True
    return False


def cards_of_kernel(root: Path, error: str) -> list[Device]:
    """The cards as the kernel module names them, for when the library cannot: each bears `error`."""
    devices = []
    for index, folder in enumerate(sorted((root / "proc/driver/nvidia/gpus").glob("*"))):
        try:
            text = (folder / "information").read_text()
        except OSError:
            text = ""
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
        uuid = fields.get("GPU UUID", "")
        name = fields.get("Model") or f"GPU {index}"
        devices.append(
            Device(index=index, name=name, kind="cuda", uuid=uuid if uuid.startswith("GPU-") else None, error=error)
        )
    return devices


def _through_nvml(load: Callable[[], Any]) -> Reading:
    library = nvml.Library(load())
    return Reading(
        devices=library.devices,
        health=library.health,
        process_mb=library.process_mb,
        close=library.close,
        driver_version=library.driver_version,
        cuda_version=library.cuda_version,
    )


def _through_smi() -> Reading:
    tool = smi.Tool(smi.run)
    return Reading(
        devices=tool.devices,
        health=tool.health,
        process_mb=tool.process_mb,
        driver_version=tool.driver_version,
        cuda_version=tool.cuda_version,
    )


def _mismatched(root: Path) -> Reading:
    devices = cards_of_kernel(root, MISMATCH)
    return Reading(
        devices=devices,
        health=lambda: [DeviceHealth(index=d.index, error=d.error) for d in devices],
        error=MISMATCH,
        refuse_loads=MISMATCH,
    )


def _on_cpu(root: Path, driver_fault: str | None) -> Reading:
    host = cpu.Host(root, os.getpid())
    error = None
    if driver_fault is not None:
        error = (
            f"an NVIDIA GPU is in this machine, but its driver does not answer ({driver_fault}); models run on the CPU "
            "until `nvidia-smi` works and neuron is started again"
        )
    return Reading(devices=[host.device], health=host.health, error=error)
