"""What is told of a model does not change by being told."""

from __future__ import annotations

import time

import pytest

from helexa.neuron import listing


def test_the_time_of_its_last_use_is_told_the_same_however_often_and_whatever_the_clock_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = [time.monotonic() - age * 0.0137 for age in range(200)]
    told = [listing._as_utc(moment) for moment in moments]
    monkeypatch.setattr(listing.time, "monotonic", lambda: moments[0] + 3600)  # as if the wall clock had been set back
    assert [listing._as_utc(moment) for moment in moments] == told


def test_a_model_that_was_never_used_has_no_time_of_its_last_use() -> None:
    assert listing._as_utc(0.0) is None
