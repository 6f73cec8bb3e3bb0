"""What this node's devices have left: the ledger of our models, and what the devices say of themselves.

Everybody who asks for free memory (a load, an estimate, /health, the gateway) is answered from here, so that they
cannot disagree. Readings are kept: only `refresh` looks at a device, in a thread, and never waits for one that hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from helexa.core import logs
from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron.discovery import Probe
from helexa.neuron.harness.base import FreeDevice
from helexa.neuron.hosts import Host
from helexa.neuron.memory import Claim, Ledger
from helexa.neuron.tasks import owned

_log = logs.get("neuron.devices")

READING_S: Final = 5.0  # a driver that takes longer is left alone, and its last figures stand
BACK_S: Final = 3.0  # what a driver gets to give a dead process's memory back
BACK_LOOK_S: Final = 0.02
BACK_SHARE: Final = 0.9  # of what was measured: somebody else may take some meanwhile
WORTH_TELLING: Final = 0.01  # of a device's memory: smaller changes make no event


class Devices:
    """on_change: told of a device whose figures changed."""

    def __init__(
        self, probe: Probe, limits_mb: Sequence[int] | None, on_change: Callable[[DeviceHealth], None]
    ) -> None:
        self._probe = probe
        self._on_change = on_change
        self._devices = probe.discovery().devices
        self._kinds = {device.index: device.kind for device in self._devices}
        self._readings: dict[int, DeviceHealth] = {}
        self._told: dict[int, DeviceHealth] = {}
        self._looking: asyncio.Task[list[DeviceHealth]] | None = None
        self.ledger = Ledger(_limits(self._devices, limits_mb))

    async def refresh(self) -> None:
        """Look at the devices anew. Never raises; a look that hangs is not waited for, nor begun twice."""
        if self._looking is None or self._looking.done():
            self._looking = owned(asyncio.to_thread(self._probe.health))  # it may end too late
        looking = self._looking
        done, _ = await asyncio.wait({looking}, timeout=READING_S)
        if not done:
            _log.warning("a device does not answer; its last figures stand", within_s=READING_S)
            return
        try:
            self._readings = {reading.index: reading for reading in looking.result()}
        except Exception as err:
            _log.warning("the devices could not be read; their last figures stand", error=str(err))
        self.tell()

    @property
    def is_stuck(self) -> bool:
        """A look at the devices has begun and does not end."""
        return self._looking is not None and not self._looking.done()

    def says_mb(self) -> dict[int, int | None]:
        """What each device last said is free."""
        return {device.index: self._says_mb(device.index) for device in self._devices}

    async def given_back(self, claim: Claim, before_mb: Mapping[int, int | None]) -> None:
        """After its host ended: returns when the devices say that its memory is back, or after a bounded while.

        The kernel frees a process's own memory before it is reaped; a driver may take longer to free a device's.
        """
        wanted = {index: mb * BACK_SHARE for index, mb in claim.taken_mb.items() if self._kinds.get(index) != "cpu"}
        until = time.monotonic() + BACK_S
        while True:
            await self.refresh()
            now = {index: self._says_mb(index) for index in wanted}
            if all((now[i] or 0) - (before_mb[i] or 0) >= mb for i, mb in wanted.items()) or time.monotonic() > until:
                return
            await asyncio.sleep(BACK_LOOK_S)

    def health(self) -> list[DeviceHealth]:
        """From memory. Free is what a load may take, used at least what our models hold."""
        return [self._health(device) for device in self._devices]

    def free(self, *, without: Claim | None = None) -> list[FreeDevice]:
        """As a load may use them now. Devices in error, or of which nothing is known, are left out."""
        left = ((device, self._free_mb(device.index, without)) for device in self._usable())
        return [_offer(device, mb) for device, mb in left if mb is not None]

    def empty(self) -> list[FreeDevice]:
        """As if no model were loaded: what does not fit here never will."""
        return [
            _offer(device, limit)
            for device in self._usable()
            if (limit := self.ledger.limits_mb.get(device.index)) is not None
        ]

    def reserve(self, owner: str, need_mb: Mapping[int, int]) -> Claim:
        """At once, from the last readings. Raises memory.DoesNotFit."""
        return self.ledger.reserve(owner, need_mb, {index: self._says_mb(index) for index in need_mb})

    def reserve_beside(self, owner: str, host_mb: int) -> Claim:
        """Memory of the host for what ends when a load begins; of nothing, where no device is the host's own memory."""
        need_mb = {device.index: host_mb for device in self._usable() if device.kind == "cpu"}
        return self.ledger.reserve(owner, need_mb, {index: self._says_mb(index) for index in need_mb}, yields=True)

    async def measure(self, claim: Claim, host: Host) -> None:
        """Note in the claim what its host holds now; what cannot be measured stays as it was estimated."""
        held: dict[int, int] = {}
        taken: dict[int, int] = {}
        for device in self._devices:
            if device.index in claim.need_mb and device.kind == "cpu" and (memory := host.memory()) is not None:
                held[device.index] = _mb(memory.total)
                taken[device.index] = _mb(memory.own)
        if not held and host.pid is not None:
            held = await asyncio.to_thread(self._probe.process_mb, host.pid)
            taken = held
        if held:
            claim.measure(held, taken)

    def tell(self) -> None:
        """Tell of each device whose figures are no longer those that were told."""
        for device in self._devices:
            health = self._health(device)
            if _differs(self._told.get(device.index), health, device.vram_total_mb):
                self._told[device.index] = health
                self._on_change(health)

    def _usable(self) -> list[Device]:
        return [device for device in self._devices if device.error is None]

    def _health(self, device: Device) -> DeviceHealth:
        reading = self._readings.get(device.index) or DeviceHealth(index=device.index)
        free = self._free_mb(device.index, None)
        limit = self.ledger.limits_mb.get(device.index)
        told = None if limit is None or limit == device.vram_total_mb else limit
        used = self.ledger.used_mb(device.index)
        if reading.vram_used_mb is not None:
            used = max(used, reading.vram_used_mb)
        elif not used:
            return msgspec.structs.replace(reading, vram_free_mb=free, vram_limit_mb=told)
        return msgspec.structs.replace(reading, vram_free_mb=free, vram_limit_mb=told, vram_used_mb=used)

    def _says_mb(self, index: int) -> int | None:
        reading = self._readings.get(index)
        return None if reading is None else reading.vram_free_mb

    def _free_mb(self, index: int, without: Claim | None) -> int | None:
        return self.ledger.free_mb(index, self._says_mb(index), without=without)


def _limits(devices: Sequence[Device], limits_mb: Sequence[int] | None) -> dict[int, int]:
    limits: dict[int, int] = {}
    for place, device in enumerate(devices):
        asked = limits_mb[place] if limits_mb is not None and place < len(limits_mb) else None
        known = [mb for mb in (asked, device.vram_total_mb) if mb is not None]
        if known:
            limits[device.index] = min(known)
    return limits


def _offer(device: Device, free_mb: int) -> FreeDevice:
    total = device.vram_total_mb
    return FreeDevice(
        index=device.index,
        kind=device.kind or "cuda",
        name=device.name,
        free_mb=free_mb,
        total_mb=free_mb if total is None else total,
    )


def _differs(told: DeviceHealth | None, now: DeviceHealth, total_mb: int | None) -> bool:
    if told is None or told.error != now.error:
        return True
    worth = (total_mb or 0) * WORTH_TELLING
    pairs = ((told.vram_free_mb, now.vram_free_mb), (told.vram_used_mb, now.vram_used_mb))
    return any((a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > worth) for a, b in pairs)


def _mb(count: int) -> int:
    return -(-count // (1 << 20))
