"""NVML without a GPU: an object of pynvml's shape over a list of cards. Constants and errors are the real binding's."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

MB = 1 << 20


@dataclass
class FakeCard:
    name: str = "NVIDIA GeForce RTX 3090"
    uuid: str = "GPU-0"
    total_mb: int | None = 24576  # None: memory is not supported
    used_mb: int = 1000
    utilization: int | None = 50
    temperature: int | None = 60
    capability: tuple[int, int] | None = (8, 6)
    mig: bool | None = None  # None: MIG is not supported
    instances: dict[int, FakeCard] = field(default_factory=dict)
    error: int | None = None  # an NVML_ERROR_* for every question about this card
    max_instances: int = 7
    processes: dict[int, int | None] = field(default_factory=dict)  # pid -> MB; None: not available


class FakeNvml:
    def __init__(self, cards: list[FakeCard], *, init_error: int | None = None) -> None:
        self.cards = cards
        self.init_error = init_error
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        """NVML_* constants and NVMLError; a function that is not faked here must not be asked for."""
        if name.startswith(("NVML_", "NVMLError")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.90.07"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        card = self.cards[index]
        if card.error is not None:
            raise pynvml.NVMLError(card.error)
        return card

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> Any:
        total = self._known(card.total_mb)
        return SimpleNamespace(total=total * MB, used=card.used_mb * MB, free=(total - card.used_mb) * MB)

    def nvmlDeviceGetUtilizationRates(self, card: FakeCard) -> Any:
        return SimpleNamespace(gpu=self._known(card.utilization), memory=0)

    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._known(card.temperature)

    def nvmlDeviceGetCudaComputeCapability(self, card: FakeCard) -> tuple[int, int]:
        return self._known(card.capability)

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> tuple[int, int]:
        mode = int(self._known(card.mig))
        return mode, mode

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return card.max_instances

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        if index not in card.instances:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.instances[index]

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[Any]:
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if used is None else used * MB)
            for pid, used in card.processes.items()
        ]

    @staticmethod
    def _known(value: Any) -> Any:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value
