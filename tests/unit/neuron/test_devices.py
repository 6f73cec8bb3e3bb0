from __future__ import annotations

import threading

import pytest
from tests.helpers.aio import run

from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron import devices as module
from helexa.neuron.devices import Devices
from helexa.neuron.discovery import Probe, Reading


def card(index: int, total_mb: int | None = 1000, *, error: str | None = None) -> Device:
    return Device(index=index, name=f"card {index}", kind="cuda", vram_total_mb=total_mb, error=error)


class Cards:
    """Two cards of 1,000 MB; free is what a look tells of each."""

    def __init__(self, *cards: Device, limits: list[int] | None = None) -> None:
        self.free: dict[int, int | None] = {0: 900, 1: 900}
        self.told: list[DeviceHealth] = []
        found = list(cards) or [card(0), card(1)]
        self.devices = Devices(Probe(Reading(devices=found, health=self.health)), limits, self.told.append)

    def health(self) -> list[DeviceHealth]:
        return [DeviceHealth(index=i, vram_free_mb=mb) for i, mb in self.free.items()]


def test_each_device_has_its_own_limit() -> None:
    async def main() -> None:
        cards = Cards(limits=[300])
        await cards.devices.refresh()
        assert [(d.index, d.free_mb) for d in cards.devices.free()] == [(0, 300), (1, 900)]
        assert [d.free_mb for d in cards.devices.empty()] == [300, 1000]

    run(main())


def test_a_device_in_error_or_of_which_nothing_is_known_is_not_offered() -> None:
    async def main() -> None:
        cards = Cards(card(0, error="fell off the bus"), card(1), card(2, None))
        await cards.devices.refresh()
        assert [d.index for d in cards.devices.free()] == [1]
        assert [h.index for h in cards.devices.health()] == [0, 1, 2]

    run(main())


def test_a_reservation_shows_in_what_is_free_and_used_at_once() -> None:
    async def main() -> None:
        cards = Cards()
        await cards.devices.refresh()
        cards.devices.reserve("m", {0: 400})
        health = cards.devices.health()[0]
        assert (health.vram_used_mb, health.vram_free_mb) == (400, 500)

    run(main())


def test_changes_worth_telling_are_told_once() -> None:
    async def main() -> None:
        cards = Cards()
        await cards.devices.refresh()
        assert len(cards.told) == 2
        cards.free[0] = 895
        await cards.devices.refresh()
        assert len(cards.told) == 2
        cards.free[0] = 500
        await cards.devices.refresh()
        await cards.devices.refresh()
        assert [(h.index, h.vram_free_mb) for h in cards.told[2:]] == [(0, 500)]

    run(main())


def test_a_driver_that_hangs_holds_up_nobody_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READING_S", 0.01)
    release, looks = threading.Event(), []

    class Hanging(Cards):
        def health(self) -> list[DeviceHealth]:
            looks.append(1)
            if len(looks) > 1:
                release.wait(10)
            return super().health()

    async def main() -> None:
        cards = Hanging()
        await cards.devices.refresh()
        await cards.devices.refresh()
        await cards.devices.refresh()
        assert cards.devices.is_stuck
        assert cards.devices.health()[0].vram_free_mb == 900  # the last figures stand
        assert len(looks) == 2
        release.set()

    run(main())


def test_a_reading_that_fails_leaves_the_last_figures() -> None:
    class Failing(Cards):
        def health(self) -> list[DeviceHealth]:
            if self.told:
                raise OSError("gone")
            return super().health()

    async def main() -> None:
        cards = Failing()
        await cards.devices.refresh()
        await cards.devices.refresh()
        assert cards.devices.health()[1].vram_free_mb == 900

    run(main())
