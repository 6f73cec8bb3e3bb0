"""nvidia-smi's output, after its documented formats: tests/fixtures/nvidia_smi, a folder per kind of host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron.discovery import smi
from helexa.neuron.discovery.faults import DriverMismatch, NoGpu

FIXTURES = Path(__file__).parents[3] / "fixtures" / "nvidia_smi"
EXIT_CODES = {"lost": 15, "mismatch": 18, "no_driver": 9}  # as nvidia-smi(1) lists them


def recorded(case: str) -> smi.Runner:
    """nvidia-smi as it would answer on that host."""

    def run(args: Sequence[str]) -> tuple[int, str]:
        if args == ["-q"]:
            name = "q.txt"
        elif args == ["-L"]:
            name = "list.txt"
        elif args[0] == "-i":
            return 0, (FIXTURES / case / f"query.{args[1]}.csv").read_text()
        elif case == "old_driver" and "compute_cap" not in args[0]:
            name = "query.old.csv"
        else:
            name = "query.csv"
        return EXIT_CODES.get(case, 0), (FIXTURES / case / name).read_text()

    return run


def test_two_equal_cards() -> None:
    tool = smi.Tool(recorded("two_equal"))
    assert (tool.driver_version, tool.cuda_version) == ("550.90.07", "12.4")
    assert tool.devices[0] == Device(
        index=0,
        name="NVIDIA GeForce RTX 3090",
        kind="cuda",
        uuid="GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f",
        vram_total_mb=24576,
        compute_capability="8.6",
    )
    assert tool.health() == [
        DeviceHealth(index=0, vram_used_mb=18342, vram_free_mb=5893, utilization_pct=87, temp_c=71),
        DeviceHealth(index=1, vram_used_mb=1, vram_free_mb=24234, utilization_pct=0, temp_c=38),
    ]


def test_unequal_cards_keep_their_own_figures() -> None:
    devices = smi.Tool(recorded("unequal")).devices
    assert [(d.name[-4:], d.vram_total_mb, d.compute_capability) for d in devices] == [
        ("4090", 24564, "8.9"),
        ("3060", 12288, "8.6"),
    ]


def test_with_mig_on_the_instances_are_the_devices() -> None:
    tool = smi.Tool(recorded("mig_on"))
    assert [(d.index, d.name, d.vram_total_mb) for d in tool.devices] == [
        (0, "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19968),
        (1, "NVIDIA A100-SXM4-40GB MIG 2g.10gb", 9856),
        (2, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864),
        (3, "NVIDIA A100-SXM4-40GB", 40960),
    ]
    assert tool.devices[0].uuid == "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"
    assert tool.health()[2] == DeviceHealth(index=2, vram_used_mb=12, vram_free_mb=4852, temp_c=29)


def test_mig_without_an_instance_says_what_to_do() -> None:
    (device,) = smi.Tool(recorded("mig_empty")).devices
    assert "nvidia-smi mig" in (device.error or "")


def test_a_lost_card_is_reported_and_the_others_are_asked_for_one_by_one() -> None:
    tool = smi.Tool(recorded("lost"))
    assert [(d.index, d.name, d.error is None) for d in tool.devices] == [
        (0, "GPU 0", False),
        (1, "NVIDIA GeForce RTX 3090", True),
    ]
    assert "cannot open the GPU at 0000:01:00.0 (GPU is lost. Reboot" in (tool.devices[0].error or "")
    assert [h.vram_free_mb for h in tool.health()] == [None, 24234]


def test_a_card_whose_memory_cannot_be_read_is_in_error() -> None:
    tool = smi.Tool(recorded("unreadable"))
    assert [d.error is None for d in tool.devices] == [False, True]
    assert "Unknown Error" in (tool.devices[0].error or "")
    assert tool.devices[0].vram_total_mb is None


def test_a_card_that_is_lost_while_we_run_keeps_its_place() -> None:
    case = "two_equal"
    tool = smi.Tool(lambda args: recorded(case)(args))
    case = "lost"
    health = tool.health()
    assert [h.index for h in health] == [0, 1]
    assert "GPU is lost" in (health[0].error or "")
    assert health[1].vram_free_mb == 24234


def test_a_driver_updated_while_we_run_is_told_by_health() -> None:
    case = "two_equal"
    tool = smi.Tool(lambda args: recorded(case)(args))
    case = "mismatch"
    assert [h.error for h in tool.health()] == ["the NVIDIA driver was updated while neuron runs"] * 2


def test_na_fields_are_unknown_and_not_zero() -> None:
    tool = smi.Tool(recorded("na"))
    (device,) = tool.devices
    assert (device.vram_total_mb, device.error, device.compute_capability) == (None, None, "12.1")
    assert tool.health() == [DeviceHealth(index=0)]
    assert tool.cuda_version == "13.0"  # newer drivers write "CUDA UMD Version"


def test_an_old_driver_is_asked_again_without_what_it_does_not_know() -> None:
    tool = smi.Tool(recorded("old_driver"))
    (device,) = tool.devices
    assert (device.name, device.vram_total_mb, device.compute_capability) == ("GeForce GTX 1080 Ti", 11178, None)


def test_a_driver_library_mismatch_is_recognised() -> None:
    with pytest.raises(DriverMismatch):
        smi.Tool(recorded("mismatch"))


def test_no_driver_is_no_gpu() -> None:
    with pytest.raises(NoGpu, match="couldn't communicate with the NVIDIA driver"):
        smi.Tool(recorded("no_driver"))


@pytest.mark.parametrize("text", ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "ERR!", "", " [GPU is lost] "])
def test_words_in_place_of_a_value_are_unknown(text: str) -> None:
    assert smi.known(text) is None


def test_a_name_with_a_comma_is_one_field() -> None:
    row = '0, GPU-x, "Quadro, special", 550.1, 8.6, 100, 1, 99, 0, 30, [N/A]'
    assert [c.name for c in smi.parse_cards(row)] == ["Quadro, special"]


def test_noise_between_the_rows_is_passed_over() -> None:
    noise = "WARNING: infoROM is corrupted at gpu 0000:01:00.0\n"
    text = (FIXTURES / "two_equal" / "query.csv").read_text()
    assert len(smi.parse_cards(noise + text + "\n" + noise)) == 2


def test_a_process_s_memory_is_read_from_the_compute_apps() -> None:
    rows = "GPU-a, 42, 1834\nGPU-b, 42, [N/A]\nGPU-b, 43, 99\nGPU-x, 42, 7\nNo running processes found\nGPU-a, 42, 6\n"
    assert smi.parse_process_memory(rows, 42, {"GPU-a": 0, "GPU-b": 1}) == {0: 1840}
