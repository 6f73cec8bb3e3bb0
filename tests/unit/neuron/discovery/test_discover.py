from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
from tests.helpers.fake_nvml import FakeCard, FakeNvml

from helexa.core.discovery import Device
from helexa.neuron import discovery
from helexa.neuron.discovery import Probe, faults, smi

INFORMATION = """Model: \t\t NVIDIA GeForce RTX 3090
IRQ:   \t\t 71
GPU UUID: \t GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f
Bus Location: \t 0000:01:00.0
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose /sys and /proc are a folder, without nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def discover(host: Path, binding: FakeNvml) -> Probe:
    return discovery.discover(load_nvml=lambda: binding, root=host)


def plug_card(host: Path) -> None:
    cards = (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "0x10de", "0x030200"))
    for name, vendor, pci_class in cards:
        folder = host / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(pci_class + "\n")


def test_a_host_without_a_gpu_has_one_cpu_device(host: Path) -> None:
    probe = discover(host, FakeNvml([], init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    found = probe.discovery()
    (device,) = found.devices
    assert (device.index, device.kind, found.error, probe.refuse_loads) == (0, "cpu", None, None)
    assert device.name.startswith("CPU ")
    assert (device.vram_total_mb or 0) > 0
    assert found.hostname
    assert found.os == sys.platform
    (health,) = probe.health()
    assert health.vram_free_mb
    probe.close()


def test_nvml_is_asked_first(host: Path) -> None:
    binding = FakeNvml([FakeCard(), FakeCard()])
    probe = discover(host, binding)
    assert (len(probe.discovery().devices), probe.discovery().cuda_version) == (2, "12.4")
    probe.close()
    assert binding.open == 0


def test_nvidia_smi_is_asked_where_nvml_is_not_there(host: Path) -> None:
    """A real program in the place of nvidia-smi: what is run, and how its output is read."""
    program = host / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  -q) echo 'CUDA Version                              : 12.6' ;;\n"
        "  *) echo '0, GPU-x, NVIDIA L4, 560.35.03, 8.9, 23034, 4, 22515, 0, 35, [N/A]' ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    found = discover(host, FakeNvml([], init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)).discovery()
    assert (found.driver_version, found.cuda_version) == ("560.35.03", "12.6")
    assert [d.name for d in found.devices] == ["NVIDIA L4"]


def test_a_mismatch_is_one_sentence_and_refuses_loads(host: Path) -> None:
    folder = host / "proc/driver/nvidia/gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(INFORMATION)
    probe = discover(host, FakeNvml([], init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    assert probe.refuse_loads == probe.discovery().error == faults.MISMATCH
    assert "\n" not in faults.MISMATCH
    assert probe.discovery().devices == [
        Device(
            index=0,
            name="NVIDIA GeForce RTX 3090",
            kind="cuda",
            uuid="GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f",
            error=faults.MISMATCH,
        )
    ]
    assert [h.error for h in probe.health()] == [faults.MISMATCH]


def test_a_gpu_without_a_driver_is_not_passed_over_in_silence(host: Path) -> None:
    plug_card(host)
    probe = discover(host, FakeNvml([], init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    assert [d.kind for d in probe.discovery().devices] == ["cpu"]
    assert "Driver Not Loaded" in (probe.discovery().error or "")
    assert probe.refuse_loads is None


def test_only_display_controllers_of_nvidia_are_gpus(tmp_path: Path) -> None:
    assert not discovery.has_nvidia_card(tmp_path)
    plug_card(tmp_path)
    assert discovery.has_nvidia_card(tmp_path)
    (tmp_path / "sys/bus/pci/devices/c/vendor").write_text("0x1002\n")
    assert not discovery.has_nvidia_card(tmp_path)


def test_a_missing_program_is_no_gpu(host: Path) -> None:
    with pytest.raises(faults.NoGpu, match="not installed"):
        smi.run(["-L"])


def test_the_binding_is_imported_only_when_it_is_looked_for() -> None:
    code = "import sys, helexa.neuron.discovery; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
