from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.aio import run
from tests.helpers.scripted import Script, ScriptedHarness, write_model

from helexa.core.discovery import Device, DeviceHealth
from helexa.core.errors import BadRequest, Conflict, HelexaError, NeverLoads
from helexa.core.lifecycle import Estimate, LoadRequest
from helexa.neuron.devices import Devices
from helexa.neuron.discovery import Probe, Reading
from helexa.neuron.harness.base import ModelFiles
from helexa.neuron.planner import Placed, Planner


class Missing(ScriptedHarness):
    """Installed nowhere."""

    def why_not(self) -> str | None:
        return "the engine is not installed: pip install it"


def place(tmp_path: Path, harnesses: dict[str, ScriptedHarness], script: Script | None = None, **asked: str) -> Placed:
    path = write_model(tmp_path / "m.gguf", script)
    device = Device(index=0, name="d", kind="cpu", vram_total_mb=1000)
    probe = Probe(Reading(devices=[device], health=lambda: [DeviceHealth(index=0, vram_free_mb=600)]))

    async def main() -> Placed:
        planner = Planner(harnesses, Devices(probe, None, lambda health: None))
        return await planner.place(LoadRequest(model_id="m", **asked), ModelFiles("m", (path,)))

    return run(main())


@pytest.mark.parametrize("word", ["candle", "auto"])
def test_a_word_that_means_choose_for_me_takes_the_first_that_can_run(tmp_path: Path, word: str) -> None:
    good = ScriptedHarness()
    assert place(tmp_path, {"missing": Missing(), "good": good}, harness=word).harness is good
    assert place(tmp_path, {"missing": Missing(), "good": good}).harness is good


def test_a_harness_that_cannot_run_here_says_how_it_could(tmp_path: Path) -> None:
    for asked in ({}, {"harness": "missing"}):
        with pytest.raises(NeverLoads, match="pip install"):
            place(tmp_path, {"missing": Missing()}, **asked)


def test_an_unknown_harness_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="use one of good"):
        place(tmp_path, {"good": ScriptedHarness()}, harness="better")


@pytest.mark.parametrize(
    ("needs_mb", "kind", "code", "free_mb"),
    [(601, Conflict, "insufficient_memory", 600), (1001, NeverLoads, "load_impossible", 1000)],
)
def test_what_an_unload_could_mend_is_told_apart_from_what_never_fits(
    tmp_path: Path, needs_mb: int, kind: type[HelexaError], code: str, free_mb: int
) -> None:
    with pytest.raises(kind) as refused:
        place(tmp_path, {"good": ScriptedHarness()}, Script(needs_mb=needs_mb))
    assert refused.value.code == code
    assert (refused.value.details["need_mb"], refused.value.details["free_mb"]) == (needs_mb, free_mb)
    assert ("nload a model" in refused.value.message) == (kind is Conflict)


@pytest.mark.parametrize(("needs_mb", "never", "free_mb"), [(600, False, 600), (601, False, 600), (1001, True, 1000)])
def test_an_estimate_tells_what_fits_now_from_what_never_will(
    tmp_path: Path, needs_mb: int, never: bool, free_mb: int
) -> None:
    path = write_model(tmp_path / "m.gguf", Script(needs_mb=needs_mb))
    device = Device(index=0, name="d", kind="cpu", vram_total_mb=1000)
    probe = Probe(Reading(devices=[device], health=lambda: [DeviceHealth(index=0, vram_free_mb=600)]))

    async def main() -> Estimate:
        planner = Planner({"good": ScriptedHarness()}, Devices(probe, None, lambda health: None))
        return await planner.estimate(LoadRequest(model_id="m"), ModelFiles("m", (path,)), without=None)

    said = run(main())
    assert (said.fits, said.never, said.devices[0].free_mb) == (needs_mb == 600, never, free_mb)


def test_what_fits_is_reserved(tmp_path: Path) -> None:
    placed = place(tmp_path, {"good": ScriptedHarness()}, Script(needs_mb=600))
    assert placed.claim.need_mb == {0: 600}
    assert not placed.claim.kept
