"""The CPU as a device, over a small tree that looks like /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from helexa.neuron.discovery.cpu import Host, cpu_name, group_limit, headroom, memory_groups

MB = 1 << 20


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_name_is_the_model_s() -> None:
    assert cpu_name(Path("/")).startswith("CPU ")


def test_the_name_is_read_from_cpuinfo(tmp_path: Path) -> None:
    put(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 9  7950X\n\nmodel name\t: other\n"})
    assert cpu_name(tmp_path) == "CPU AMD Ryzen 9 7950X"


def test_without_a_model_name_there_is_the_architecture(tmp_path: Path) -> None:
    assert cpu_name(tmp_path) != "CPU "


def test_the_memory_is_the_host_s() -> None:
    host = Host(Path("/nonexistent"), os.getpid())
    total = psutil.virtual_memory().total // MB
    assert host.device.vram_total_mb == total
    (health,) = host.health()
    assert health.vram_used_mb is not None
    assert health.vram_free_mb is not None
    assert total - 1 <= health.vram_used_mb + health.vram_free_mb <= total
    assert health.utilization_pct is not None


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    return put(
        tmp_path,
        {
            "proc/7/cgroup": "0::/system.slice/neuron.service\n",
            "sys/fs/cgroup/system.slice/neuron.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/neuron.service/memory.current": f"{100 * MB}\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{512 * MB}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{200 * MB}\n",
            "sys/fs/cgroup/system.slice/memory.stat": f"anon 1\ninactive_file {50 * MB}\nactive_file {9 * MB}\n",
        },
    )


def test_the_tightest_control_group_above_counts(v2: Path) -> None:
    host = Host(v2, 7)
    assert host.device.vram_total_mb == 512
    (health,) = host.health()
    # 512 less 200 used, of which 50 are cached file pages that the kernel gives back
    assert (health.vram_free_mb, health.vram_used_mb) == (362, 150)


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/7/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{300 * MB}\n",  # the container's own root
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{120 * MB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {20 * MB}\n",
        },
    )
    (health,) = Host(tmp_path, 7).health()
    assert health.vram_free_mb == 200


def test_no_limit_is_none(tmp_path: Path) -> None:
    put(tmp_path, {"a/memory.max": "max", "b/memory.limit_in_bytes": "9223372036854771712", "c/x": ""})
    assert [group_limit(tmp_path / g) for g in "abc"] == [None, None, None]
    assert list(headroom(tmp_path / "a")) == []


def test_groups_are_walked_from_the_process_to_the_root(v2: Path) -> None:
    base = v2 / "sys/fs/cgroup"
    assert list(memory_groups(v2, 7)) == [base / "system.slice/neuron.service", base / "system.slice", base]
    assert list(memory_groups(v2, 8)) == []
