"""NVIDIA GPUs through NVML, the driver's own library.

`pynvml` (nvidia-ml-py) is imported when first looked for: it is 7,000 lines that a host without a GPU never needs.
Everything here takes the module as an argument, so that it can be driven by records of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron.discovery.faults import DriverMismatch, NoGpu

MB: Final = 1 << 20
NO_MIG_INSTANCE: Final = (
    "MIG is on, but there is no MIG instance on this card: create one (`nvidia-smi mig -cgi ... -C`), or switch MIG off"
)
# Errors that are about the whole card and not about one question (nvml.h, nvmlReturn_t).
_CARD_ERRORS: Final = {
    "NVML_ERROR_GPU_IS_LOST": "the GPU has fallen off the bus (GPU is lost); reboot this host",
    "NVML_ERROR_RESET_REQUIRED": "the GPU needs a reset (`nvidia-smi --gpu-reset`, or a reboot)",
    "NVML_ERROR_IRQ_ISSUE": "the kernel reports an interrupt problem with this GPU; see `dmesg`",
    "NVML_ERROR_INSUFFICIENT_POWER": "the external power cables of this GPU are not attached properly",
    "NVML_ERROR_CORRUPTED_INFOROM": "the infoROM of this GPU is corrupted",
    "NVML_ERROR_NO_PERMISSION": "this user may not open the GPU (permissions of /dev/nvidia*)",
    "NVML_ERROR_UNKNOWN": "the driver gives an unknown error for this GPU; see `dmesg`",
}

T = TypeVar("T")


def load() -> Any:
    """The binding; NoGpu where it is not installed."""
    try:
        import pynvml
    except ImportError as err:
        raise NoGpu("nvidia-ml-py is not installed") from err
    return pynvml


@dataclass(frozen=True, slots=True)
class _Place:
    """How to find a device again: handles are asked for anew each time, because a reset card gets a new one."""

    card: int
    instance: int | None = None  # a MIG slice of the card


class Library:
    """NVML, initialised. Safe to use from any one thread at a time."""

    def __init__(self, binding: Any) -> None:
        self._nvml = binding
        try:
            binding.nvmlInit()
        except binding.NVMLError as err:
            if err.value == binding.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                raise DriverMismatch from err
            raise NoGpu(f"NVML: {err}") from err
        self.driver_version = self._ask(binding.nvmlSystemGetDriverVersion)
        self.cuda_version = cuda_version(self._ask(binding.nvmlSystemGetCudaDriverVersion))
        self.devices: list[Device] = []
        self._places: list[_Place] = []
        for card in range(self._ask(binding.nvmlDeviceGetCount) or 0):
            self._add_card(card)
        if not self.devices:
            self.close()
            raise NoGpu("NVML finds no GPU")

    def close(self) -> None:
        self._ask(self._nvml.nvmlShutdown)

    def health(self) -> list[DeviceHealth]:
        return [self._health(device, place) for device, place in zip(self.devices, self._places, strict=True)]

    def process_mb(self, pid: int) -> dict[int, int]:
        n = self._nvml
        held: dict[int, int] = {}
        for device, place in zip(self.devices, self._places, strict=True):
            try:
                processes = n.nvmlDeviceGetComputeRunningProcesses(self._handle(place))
            except n.NVMLError:
                continue
            known = [p.usedGpuMemory for p in processes if p.pid == pid and p.usedGpuMemory is not None]
            if known:
                held[device.index] = sum(known) // MB
        return held

    def _handle(self, place: _Place) -> Any:
        card = self._nvml.nvmlDeviceGetHandleByIndex(place.card)
        if place.instance is None:
            return card
        return self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, place.instance)

    def _add_card(self, card: int) -> None:
        n = self._nvml
        index = len(self.devices)
        try:
            handle = n.nvmlDeviceGetHandleByIndex(card)
            name = n.nvmlDeviceGetName(handle)
            memory = self._memory(handle)
        except n.NVMLError as err:
            self._add(Device(index=index, name=f"GPU {card}", kind="cuda", error=self._card_error(err)), _Place(card))
            return
        capability = self._ask(n.nvmlDeviceGetCudaComputeCapability, handle)
        compute = f"{capability[0]}.{capability[1]}" if capability else None
        if not self._mig_is_on(handle):
            device = Device(
                index=index,
                name=name,
                kind="cuda",
                uuid=self._ask(n.nvmlDeviceGetUUID, handle),
                vram_total_mb=memory.total // MB if memory else None,
                compute_capability=compute,
            )
            self._add(device, _Place(card))
            return
        # A card with MIG on takes no work itself: its instances are the devices.
        for instance in range(self._ask(n.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            self._add_instance(handle, card, instance, name, compute)
        if len(self.devices) == index:
            self._add(Device(index=index, name=name, kind="cuda", error=NO_MIG_INSTANCE), _Place(card))

    def _add_instance(self, card_handle: Any, card: int, instance: int, card_name: str, compute: str | None) -> None:
        n = self._nvml
        try:
            handle = n.nvmlDeviceGetMigDeviceHandleByIndex(card_handle, instance)
        except n.NVMLError:
            return  # not made: the maximum is counted, not what there is
        memory = self._ask(n.nvmlDeviceGetMemoryInfo, handle)
        device = Device(
            index=len(self.devices),
            name=self._ask(n.nvmlDeviceGetName, handle) or f"{card_name} MIG {instance}",
            kind="cuda",
            uuid=self._ask(n.nvmlDeviceGetUUID, handle),
            vram_total_mb=memory.total // MB if memory else None,
            compute_capability=compute,
        )
        self._add(device, _Place(card, instance))

    def _add(self, device: Device, place: _Place) -> None:
        self.devices.append(device)
        self._places.append(place)

    def _memory(self, handle: Any) -> Any:
        """None on chips that share the host's memory (GB10, Jetson); any other failure is one of the whole card."""
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(handle)
        except self._nvml.NVMLError as err:
            if err.value == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise

    def _mig_is_on(self, handle: Any) -> bool:
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, handle)  # (current, pending); not supported: None
        return mode is not None and mode[0] == self._nvml.NVML_DEVICE_MIG_ENABLE

    def _health(self, device: Device, place: _Place) -> DeviceHealth:
        n = self._nvml
        try:
            card = n.nvmlDeviceGetHandleByIndex(place.card)
            handle = self._handle(place)
            memory = self._memory(handle)
        except n.NVMLError as err:
            return DeviceHealth(index=device.index, error=self._card_error(err))
        busy = self._ask(n.nvmlDeviceGetUtilizationRates, handle)  # not supported on a MIG instance
        return DeviceHealth(
            index=device.index,
            vram_used_mb=memory.used // MB if memory else None,
            vram_free_mb=memory.free // MB if memory else None,
            utilization_pct=busy.gpu if busy else None,
            temp_c=self._ask(n.nvmlDeviceGetTemperature, card, n.NVML_TEMPERATURE_GPU),
            error=device.error,
        )

    def _card_error(self, err: Any) -> str:
        for constant, sentence in _CARD_ERRORS.items():
            if err.value == getattr(self._nvml, constant):
                return sentence
        return f"NVML: {err}"

    def _ask(self, question: Callable[..., T], *args: Any) -> T | None:
        """None where this card or driver has no answer ("Not Supported")."""
        try:
            return question(*args)
        except self._nvml.NVMLError:
            return None


def cuda_version(number: int | None) -> str | None:
    """12040 -> "12.4", as NVML gives the newest CUDA that the driver serves."""
    return None if not number else f"{number // 1000}.{number % 1000 // 10}"
