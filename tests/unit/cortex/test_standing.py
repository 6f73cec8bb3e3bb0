from __future__ import annotations

from typing import Any

import pytest

from helexa.core.lifecycle import ModelInfo, Progress
from helexa.cortex.standing import Standing


def standing(status: str = "loading", left_s: float | None = None, **progress: Any) -> Standing:
    info = ModelInfo(id="qwen", status=status, progress=Progress(**progress) if progress else None)
    return Standing("qwen", "beast", info, left_s)


@pytest.mark.parametrize(
    ("stands", "line"),
    [
        (standing(fraction=0.43), b"loading qwen on beast: 43 %"),
        (standing(fraction=0.0), b"loading qwen on beast: 0 %"),
        (standing("downloading", fraction=1.0), b"downloading qwen on beast: 100 %"),
        (standing(left_s=11.2), b"loading qwen on beast: about 12 s left"),
        (
            standing(left_s=11.2, fraction=0.5, bytes_done=2_514_000_000, bytes_total=5_028_000_000),
            b"loading qwen on beast: 50 %, 2.51 of 5.03 GB, about 12 s left",
        ),
        (standing(left_s=-3.0, bytes_done=1), b"loading qwen on beast"),  # slower than before: no guess
        (standing("recovering"), b"recovering qwen on beast"),
        (standing("melting"), b"loading qwen on beast"),
        (Standing("qwen", "beast"), b"loading qwen on beast"),
        (Standing("qwen"), b"waiting for a node that can load qwen"),
        (Standing("two\nlines: \x00"), b"waiting for a node that can load two?lines: ?"),
    ],
)
def test_a_heartbeat_says_in_one_line_how_the_load_stands(stands: Standing, line: bytes) -> None:
    assert stands.heartbeat() == line


@pytest.mark.parametrize(
    ("stands", "loading", "retry_after_s"),
    [
        (standing(), {"state": "loading", "node": "beast"}, 5),
        (
            standing(fraction=0.5, eta_seconds=7.24, left_s=3.0),
            {"state": "loading", "node": "beast", "progress": 0.5, "eta_seconds": 7.2},
            8,
        ),
        (standing(left_s=0.2), {"state": "loading", "node": "beast", "eta_seconds": 0.2}, 1),
        (standing(left_s=-4.0), {"state": "loading", "node": "beast"}, 5),
        (standing(left_s=900.0), {"state": "loading", "node": "beast", "eta_seconds": 900.0}, 60),
        (Standing("qwen"), {"state": "waiting"}, 5),
    ],
)
def test_who_cannot_wait_is_told_what_is_known_and_nothing_that_is_not(
    stands: Standing, loading: dict[str, Any], retry_after_s: int
) -> None:
    error = stands.still_loading()
    assert error.details == {"loading": loading}
    assert error.retry_after_s == retry_after_s
    assert f"try again in {retry_after_s} s" in error.message
