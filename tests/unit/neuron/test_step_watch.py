from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.neuron import step_watch
from helexa.neuron.step_watch import Phase, StepReport, StepWatch, allowed_s, report_of

S = 10**9


def both(folder: Path) -> tuple[StepReport, StepWatch]:
    path = report_of(folder / "7.sock")
    report = StepReport.create(path)
    watch = StepWatch.open(path)
    assert watch is not None
    return report, watch


def since(report: StepReport) -> int:
    return report._words[3]


def test_where_no_harness_asked_nothing_is_watched(tmp_path: Path) -> None:
    path = report_of(tmp_path / "7.sock")
    assert path.name == "7.steps"
    assert StepWatch.open(path) is None
    path.write_bytes(b"")  # made, and not yet whole
    assert StepWatch.open(path) is None
    path.write_bytes(bytes(4096))
    assert StepWatch.open(path) is None


def test_the_report_is_the_users_own(tmp_path: Path) -> None:
    both(tmp_path)
    assert (tmp_path / "7.steps").stat().st_mode & 0o777 == 0o600


def test_a_step_is_stuck_when_two_looks_find_it_over_its_time(tmp_path: Path) -> None:
    report, watch = both(tmp_path)
    report.begin(usual_s=0.5)
    late = since(report) + 31 * S
    assert watch.why_stuck(since(report) + 29 * S) is None
    assert watch.why_stuck(late) is None
    assert watch.why_stuck(late + S) == ("step 1 has run for 32 s (usually 0.5 s), longer than the 30 s it may take")


def test_another_step_at_the_second_look_is_not_the_one_that_was_late(tmp_path: Path) -> None:
    report, watch = both(tmp_path)
    report.begin()
    assert watch.why_stuck(since(report) + 31 * S) is None
    report.end()
    report.begin()
    assert watch.why_stuck(since(report) + 31 * S) is None


def test_an_engine_that_does_nothing_may_do_so_for_ever(tmp_path: Path) -> None:
    report, watch = both(tmp_path)
    report.begin()
    report.end()
    for look in range(3):
        assert watch.why_stuck(since(report) + (100_000 + look) * S) is None


@given(usual_s=st.floats(0, 1e5))
def test_a_step_may_take_twenty_times_the_usual_and_never_less_than_half_a_minute(usual_s: float) -> None:
    allowed = allowed_s(Phase.STEP, usual_s)
    assert allowed is not None
    assert allowed >= max(30, 20 * usual_s)
    assert allowed in (30, 20 * usual_s)


@pytest.mark.parametrize("phase", [Phase.FIRST, Phase.CAPTURE])
def test_the_first_step_and_a_capture_may_take_as_long_as_a_load_that_is_busy(phase: Phase) -> None:
    assert allowed_s(phase, 0.001) == step_watch.FIRST_S


def test_ranks_are_told(tmp_path: Path) -> None:
    report, watch = both(tmp_path)
    assert watch.ranks() == []
    report.ranks([os.getpid(), 17])
    assert watch.ranks() == [os.getpid(), 17]
