from __future__ import annotations

from pathlib import Path

import pytest

from helexa.cortex.simulate import trace
from helexa.cortex.simulate.trace import BadTrace, Request


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests = [Request(0.5, "a", 10, 20, [7, 9]), Request(1.25, "b")]
    trace.write(tmp_path / "t.jsonl", requests)
    assert trace.read(tmp_path / "t.jsonl") == requests


def test_lines_in_the_order_in_which_requests_ended_are_put_in_that_in_which_they_came(tmp_path: Path) -> None:
    trace.write(tmp_path / "t.jsonl", [Request(1_764_000_002.5, "a"), Request(1_764_000_000.0, "b")])
    assert trace.read(tmp_path / "t.jsonl") == [Request(0.0, "b"), Request(2.5, "a")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"t": 1, "model": "a"}\n{"model": "a"}\n', ":2: Object missing required field `t`"),
        ("no json\n", ":1: JSON is malformed"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text(lines)
    with pytest.raises(BadTrace) as raised:
        trace.read(tmp_path / "t.jsonl")
    assert says in str(raised.value)


def test_where_the_prefixes_end_is_spread_evenly_where_nobody_recorded_it() -> None:
    assert list(Request(0.0, "a", 90, 1, [1, 2, 3]).marks) == [30, 60, 90]
    assert list(Request(0.0, "a", 90, 1, [1, 2, 3], [10, 20, 80]).marks) == [10, 20, 80]


def test_a_generated_prefix_is_written_as_a_list(tmp_path: Path) -> None:
    trace.write(tmp_path / "t.jsonl", [Request(0.5, "a", 10, 20, range(7, 9))])
    assert trace.read(tmp_path / "t.jsonl") == [Request(0.5, "a", 10, 20, [7, 8])]
