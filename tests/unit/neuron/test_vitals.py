from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from helexa.neuron import vitals
from helexa.neuron.load_watch import LoadWatch

MB = 1 << 20


def test_mapped_pages_are_told_apart_from_a_process_own(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 8 * MB)
    before = vitals.memory(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert sum(mapping[i] for i in range(0, 8 * MB, 4096))
        during = vitals.memory(os.getpid())
    assert before is not None
    assert during is not None
    assert during.mapped - before.mapped >= 7 * MB
    assert during.own - before.own < 2 * MB
    assert during.total == during.own + during.mapped


def test_a_process_knows_its_parent() -> None:
    assert vitals.parent(os.getpid()) == os.getppid()
    assert vitals.parent(2**22 + 1) is None


def test_bytes_read_and_processor_time_grow(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * MB)
    read, cpu = vitals.bytes_read(os.getpid()), vitals.cpu_s(os.getpid())
    assert read is not None
    assert cpu is not None
    file.read_bytes()
    assert (vitals.bytes_read(os.getpid()) or 0) - read >= MB
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert (vitals.cpu_s(os.getpid()) or 0) > cpu


def test_a_process_that_is_not_there_has_no_vitals() -> None:
    gone = 2**22 + 1  # above the largest pid there is
    assert (vitals.memory(gone), vitals.bytes_read(gone), vitals.cpu_s(gone)) == (None, None, None)


def test_a_loads_progress_is_what_was_read_until_the_engine_tells_its_own(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 4 * MB)
    watch = LoadWatch(lambda: [os.getpid()], 8 * MB)
    file.read_bytes()
    watch.look(None)
    assert watch.fraction is not None
    assert 0.45 < watch.fraction < 0.99
    seen = watch.fraction
    watch.look(0.1)
    assert watch.fraction == seen  # never back
    watch.look(0.99)
    assert watch.fraction == 0.99
    assert watch.why_stuck() is None


def test_a_load_that_stands_still_is_told(tmp_path: Path) -> None:
    watch = LoadWatch(lambda: [2**22 + 1], MB)
    watch.look(None)
    watch._moved_at = watch._busy_at = time.monotonic() - 121
    watch.look(None)
    assert "stood still" in (watch.why_stuck() or "")
    watch._busy_at = time.monotonic()
    assert watch.why_stuck() is None
    watch._moved_at = time.monotonic() - 1201
    assert "although it was busy" in (watch.why_stuck() or "")
