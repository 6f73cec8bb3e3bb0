"""What is read out of an answer that is otherwise only carried."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.wires import CHAT

from helexa.core.relay import scan
from helexa.core.relay.contract import Exchange, Usage


def exchange() -> Exchange:
    return Exchange(CHAT, b"", b"{}", "m", True, False, False, "r", "unix", 0.0)


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("delta", "generated"),
    [
        ({"role": "assistant", "content": None}, False),
        ({"role": "assistant", "content": ""}, False),
        ({}, False),
        ({"content": "a"}, True),
        ({"reasoning_content": "hm"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
    ],
)
def test_the_first_token_is_text_reasoning_or_a_tool_call_and_never_the_role(
    delta: dict[str, Any], generated: bool
) -> None:
    found = scan.chunk_of(event(choices=[{"index": 0, "delta": delta}]))
    assert found is not None
    assert found.has_delta is generated


@pytest.mark.parametrize(
    "block", [b": hello\n\n", b"data: [DONE]\n\n", b"event: x\n\n", b"data: {oops\n\n", b"xdata: {}\n\n"]
)
def test_what_is_no_event_of_ours_is_not_read_as_one(block: bytes) -> None:
    assert scan.chunk_of(block) is None


def test_the_end_of_a_stream_tells_usage_reason_and_timings_though_it_begins_inside_an_event() -> None:
    tail = (
        b'ta":{"content":"x"}}]}\n\n'
        + event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
        + event(
            choices=[],
            usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}},
        )
        + event(choices=[], timings={"predicted_ms": 8.5})
        + b"data: [DONE]\n\n"
    )
    x = exchange()
    scan.settle_stream(x, tail)
    assert x.usage == Usage(7, 3, 5)
    assert x.finish_reason == "length"
    assert x.timings == {"predicted_ms": 8.5}


def test_words_in_an_answers_text_are_not_taken_for_its_usage() -> None:
    text = '"usage":{"prompt_tokens":999} "finish_reason":"lies"'
    body = json.dumps(
        {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1},
            "z": text,
        },
        separators=(",", ":"),
    ).encode()
    x = exchange()
    scan.settle_whole(x, body)
    assert x.usage == Usage(1, 0, 0)
    assert x.finish_reason == "stop"


@pytest.mark.parametrize(
    "tail", [b"", b'"usage":', b'"usage":{"prompt_tokens":', b'"usage":null', b'"usage":{"prompt_tokens":"x"}']
)
def test_an_end_that_tells_nothing_leaves_everything_unknown(tail: bytes) -> None:
    x = exchange()
    scan.settle_whole(x, tail)
    scan.settle_stream(x, tail)
    assert x.usage is None
    assert x.finish_reason is None


EVENTS = st.sampled_from(
    [
        event(choices=[{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]),
        event(choices=[{"index": 0, "delta": {"content": '"usage":{"x":1}'}, "finish_reason": None}], usage=None),
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}], timings={"predicted_n": 2}),
        event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3}),
        event(choices=[], usage={"prompt_tokens": 8, "completion_tokens": 4}, timings={"predicted_n": 3}),
        b'data: {"choices": [{"index": 0, "finish_reason": "tool_calls"}], "usage":null}\n\n',
        b": beat\n\n",
        b"data: [DONE]\n\n",
    ]
)


@given(events=st.lists(EVENTS, max_size=8), framed=st.booleans(), cut=st.integers(0, 200))
def test_an_end_tells_what_its_events_tell_one_after_the_other(events: list[bytes], framed: bool, cut: int) -> None:
    """cut: it begins inside an event."""
    told, one_by_one = exchange(), exchange()
    raw = b"".join(b"%x\r\n%b\r\n" % (len(e), e) if framed else e for e in events)
    first = event(choices=[{"index": 0, "delta": {"content": "the first one"}, "finish_reason": None}])
    scan.settle_stream(told, first[min(cut, len(first) - 2) :] + raw)
    for block in events:
        if (chunk := scan.chunk_of(block)) is not None:
            scan.note(one_by_one, chunk)
    assert told.usage == one_by_one.usage
    assert (told.finish_reason, told.timings) == (one_by_one.finish_reason, one_by_one.timings)
