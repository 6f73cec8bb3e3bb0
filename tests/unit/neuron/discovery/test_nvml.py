from __future__ import annotations

import pynvml
import pytest
from tests.helpers.fake_nvml import FakeCard, FakeNvml

from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron.discovery.faults import DriverMismatch, NoGpu
from helexa.neuron.discovery.nvml import Library, cuda_version


def mig_card(**instances: int) -> FakeCard:
    slices = {
        n: FakeCard(f"NVIDIA A100 MIG {name}", f"MIG-{n}", total, 10, utilization=None, temperature=None)
        for n, (name, total) in enumerate(instances.items())
    }
    return FakeCard("NVIDIA A100", "GPU-a", 40960, capability=(8, 0), mig=True, instances=slices, temperature=33)


def test_the_fake_has_only_functions_that_the_binding_has() -> None:
    functions = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert [name for name in functions if not callable(getattr(pynvml, name, None))] == []


def test_two_equal_cards() -> None:
    library = Library(FakeNvml([FakeCard(uuid="GPU-0"), FakeCard(uuid="GPU-1", used_mb=0, utilization=0)]))
    card = Device(
        index=0,
        name="NVIDIA GeForce RTX 3090",
        kind="cuda",
        uuid="GPU-0",
        vram_total_mb=24576,
        compute_capability="8.6",
    )
    assert library.devices[0] == card
    assert [d.index for d in library.devices] == [0, 1]
    assert (library.driver_version, library.cuda_version) == ("550.90.07", "12.4")
    assert library.health() == [
        DeviceHealth(index=0, vram_used_mb=1000, vram_free_mb=23576, utilization_pct=50, temp_c=60),
        DeviceHealth(index=1, vram_used_mb=0, vram_free_mb=24576, utilization_pct=0, temp_c=60),
    ]


def test_unequal_cards_keep_their_own_figures() -> None:
    library = Library(FakeNvml([FakeCard("RTX 4090", "a", 24564), FakeCard("RTX 3060", "b", 12288)]))
    assert [(d.name, d.vram_total_mb) for d in library.devices] == [("RTX 4090", 24564), ("RTX 3060", 12288)]


def test_health_is_read_anew() -> None:
    card = FakeCard()
    library = Library(FakeNvml([card]))
    card.used_mb = 20000
    assert library.health()[0].vram_used_mb == 20000


def test_mig_off_is_the_whole_card() -> None:
    assert [d.name for d in Library(FakeNvml([FakeCard("NVIDIA A100", mig=False)])).devices] == ["NVIDIA A100"]


def test_with_mig_on_the_instances_are_the_devices() -> None:
    plain = FakeCard("NVIDIA A100", "GPU-b", mig=False)
    library = Library(FakeNvml([mig_card(g3=19968, g1=4864), plain]))
    assert [(d.index, d.name, d.uuid, d.vram_total_mb) for d in library.devices] == [
        (0, "NVIDIA A100 MIG g3", "MIG-0", 19968),
        (1, "NVIDIA A100 MIG g1", "MIG-1", 4864),
        (2, "NVIDIA A100", "GPU-b", 24576),
    ]
    # The temperature is the card's; a slice knows no utilization.
    assert library.health()[1] == DeviceHealth(index=1, vram_used_mb=10, vram_free_mb=4854, temp_c=33)


def test_mig_without_an_instance_says_what_to_do() -> None:
    (device,) = Library(FakeNvml([mig_card()])).devices
    assert "nvidia-smi mig" in (device.error or "")
    assert device.vram_total_mb is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_GPU_IS_LOST, "fallen off the bus"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, "needs a reset"),
        (pynvml.NVML_ERROR_UNKNOWN, "dmesg"),
        (pynvml.NVML_ERROR_TIMEOUT, "NVML: Timeout"),
    ],
)
def test_a_card_in_error_is_reported_and_leaves_the_others_usable(code: int, words: str) -> None:
    library = Library(FakeNvml([FakeCard(uuid="a"), FakeCard(error=code), FakeCard(uuid="c")]))
    assert [d.error is None for d in library.devices] == [True, False, True]
    assert words in (library.devices[1].error or "")
    health = library.health()
    assert [h.vram_free_mb for h in health] == [23576, None, 23576]
    assert words in (health[1].error or "")


def test_a_card_that_is_lost_later_is_told_by_health() -> None:
    card = FakeCard()
    library = Library(FakeNvml([card]))
    card.error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert library.health() == [
        DeviceHealth(index=0, error="the GPU has fallen off the bus (GPU is lost); reboot this host")
    ]


def test_what_a_card_cannot_tell_is_unknown_and_not_zero() -> None:
    card = FakeCard("NVIDIA GB10", total_mb=None, utilization=None, temperature=None, capability=None)
    library = Library(FakeNvml([card]))
    assert library.devices == [Device(index=0, name="NVIDIA GB10", kind="cuda", uuid="GPU-0")]
    assert library.health() == [DeviceHealth(index=0)]


def test_a_driver_that_was_updated_without_a_reboot_is_no_missing_gpu() -> None:
    with pytest.raises(DriverMismatch):
        Library(FakeNvml([], init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))


def test_no_driver_and_no_card_are_no_gpu_and_the_library_is_closed() -> None:
    with pytest.raises(NoGpu, match="Driver Not Loaded"):
        Library(FakeNvml([], init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    nvml = FakeNvml([])
    with pytest.raises(NoGpu, match="finds no GPU"):
        Library(nvml)
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("number", "text"), [(12040, "12.4"), (11080, "11.8"), (13000, "13.0"), (0, None), (None, None)]
)
def test_cuda_version_as_it_is_usually_written(number: int | None, text: str | None) -> None:
    assert cuda_version(number) == text


def test_a_process_s_memory_is_known_per_device() -> None:
    cards = [FakeCard(uuid="a", processes={7: 5000, 8: 100}), FakeCard(uuid="b", processes={8: 1}), FakeCard(uuid="c")]
    cards[2].processes = {7: None}
    library = Library(FakeNvml(cards))
    assert library.process_mb(7) == {0: 5000}
    assert library.process_mb(9) == {}
    cards[0].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert library.process_mb(8) == {1: 1}
