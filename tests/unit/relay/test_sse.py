"""Server-sent events, however the bytes were cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.wires import split

from helexa.core.sse import MAX_EVENT_BYTES, Event, EventReader, comment, frame

DATA = st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"n").replace(b"\r", b"r").strip())
EVENTS = st.lists(st.tuples(DATA, st.none() | st.from_regex(r"[a-z_.]{1,12}", fullmatch=True)), max_size=8)


@given(events=EVENTS, cuts=st.lists(st.integers(0, 400), max_size=8), ending=st.sampled_from([b"\n", b"\r\n"]))
def test_the_same_events_come_out_wherever_the_bytes_were_cut(
    events: list[tuple[bytes, str | None]], cuts: list[int], ending: bytes
) -> None:
    stream = b"".join(frame(data, name) for data, name in events).replace(b"\n", ending)
    reader = EventReader()
    got = [event for piece in split(stream, cuts) for event in reader.feed(piece)]
    assert got == [Event(name, data) for data, name in events]
    assert reader.pending in (b"", b"\r")


def test_comments_are_told_from_events_and_an_unfinished_event_waits() -> None:
    reader = EventReader()
    assert reader.feed(comment(b"loading\n43 %") + b"data: a\n") == [Event(None, b"loading 43 %", comment=True)]
    assert reader.feed(b"data: b\n\n") == [Event(None, b"a\nb")]
    assert reader.feed(comment()) == [Event(None, b"", comment=True)]


def test_an_event_without_end_is_refused() -> None:
    reader = EventReader()
    assert reader.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(ValueError, match="event of over"):
        reader.feed(b"x")
