"""The state machine, step by step; what holds of every answer is in test_anthropic_round_trips.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helexa.core import sse
from helexa.core.dialects import neuron_chat
from helexa.core.dialects.anthropic_sinks import EventWriter, MessageBuilder
from helexa.core.dialects.anthropic_stream import Answer
from helexa.core.errors import BadRequest, ContextLengthExceeded, HelexaError, Overloaded, UpstreamError

DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return sse.frame(json.dumps(fields).encode())


def delta(finish_reason: str | None = None, stop_reason: str | None = None, **said: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": said, "finish_reason": finish_reason, "stop_reason": stop_reason}])


def usage(completion: int = 5, prompt: int = 9, cached: int = 4) -> bytes:
    details = {"cached_tokens": cached}
    told = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return event(choices=[], usage=told, timings={"predicted_n": completion})


def progress(total: int = 9, cache: int = 4, processed: int = 4) -> bytes:
    told = {"total": total, "cache": cache, "processed": processed, "time_ms": 0}
    return event(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}], prompt_progress=told)


def piece(index: int, arguments: str | None = None, **first: Any) -> bytes:
    function = {"arguments": arguments, **({"name": first.pop("name")} if "name" in first else {})}
    return delta(tool_calls=[{"index": index, "function": function, **first}])


class Seen:
    """A witness that remembers."""

    def __init__(self) -> None:
        self.tokens = 0
        self.end: tuple[neuron_chat.Usage | None, str | None, dict[str, Any] | None] | None = None

    def first_token(self) -> None:
        self.tokens += 1

    def ended(self, usage: neuron_chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None:
        self.end = (usage, finish_reason, timings)


def answering(max_tokens: int = 5, **more: Any) -> Answer:
    writer = EventWriter(message_id="msg_1", model="m")
    return Answer(writer, message_id="msg_1", max_tokens=max_tokens, **more)


def events(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(found.data) for found in sse.EventReader().feed(stream)]


def ending(*parts: bytes, max_tokens: int = 5) -> dict[str, Any]:
    answer = answering(max_tokens)
    stream = answer.feed(b"".join(parts)) + answer.finish()
    found: dict[str, Any] = next(e for e in events(stream) if e["type"] == "message_delta")
    return found


# the beginning


def test_message_start_goes_out_with_the_first_progress_and_knows_the_prompt() -> None:
    answer = answering()
    assert answer.feed(b": nothing yet\n\n") == b""
    (start,) = events(answer.feed(progress()))
    assert start["type"] == "message_start"
    assert start["message"]["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 0,
    }
    assert start["message"]["content"] == []


def test_further_progress_and_heartbeats_are_pings() -> None:
    answer = answering()
    answer.feed(progress())
    assert [e["type"] for e in events(answer.feed(progress(processed=9) + b": still here\n\n"))] == ["ping", "ping"]


def test_without_progress_the_first_token_begins_the_message_and_the_end_tells_the_tokens() -> None:
    answer = answering()
    assert answer.feed(delta(role="assistant", content=None)) == b""
    kinds = [e["type"] for e in events(answer.feed(delta(content="Hi")))]
    assert kinds == ["message_start", "content_block_start", "content_block_delta"]
    last = events(answer.feed(delta("stop") + usage()))
    assert last[-2]["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
    }


# blocks


def test_reasoning_is_a_block_of_its_own_that_is_signed_before_it_closes() -> None:
    answer = answering()
    told = events(answer.feed(delta(reasoning_content="hm") + delta(reasoning_content="!") + delta(content="So")))
    assert [e["type"] for e in told] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
    ]
    assert told[1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert [e["delta"]["type"] for e in told[2:5]] == ["thinking_delta", "thinking_delta", "signature_delta"]
    assert told[4]["delta"]["signature"].startswith("hx1.")
    assert [e["index"] for e in told[1:]] == [0, 0, 0, 0, 0, 1, 1]


def test_thinking_that_is_not_to_be_shown_has_its_block_and_signature_but_no_text() -> None:
    answer = answering(show_thinking=False)
    told = events(answer.feed(delta(reasoning_content="secret") + delta(content="So")))
    assert b"secret" not in json.dumps(told).encode()
    assert [e["type"] for e in told if e.get("index") == 0] == [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
    ]
    assert "ping" in [e["type"] for e in told]


def test_one_chunk_may_hold_reasoning_text_and_a_call() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    answer = answering()
    told = events(answer.feed(delta(reasoning_content="a", content="b", tool_calls=[call])))
    assert [e["content_block"]["type"] for e in told if e["type"] == "content_block_start"] == [
        "thinking",
        "text",
        "tool_use",
    ]


def test_parallel_calls_are_blocks_one_after_the_other() -> None:
    answer = answering()
    stream = [piece(0, "", id="a", name="f"), piece(0, '{"x":'), piece(0, "1}"), piece(1, "{}", id="b", name="g")]
    told = events(answer.feed(b"".join(stream) + delta("tool_calls") + usage()))
    starts = [e["content_block"] for e in told if e["type"] == "content_block_start"]
    assert [(b["id"], b["name"], b["input"]) for b in starts] == [("a", "f", {}), ("b", "g", {})]
    assert [e["delta"]["partial_json"] for e in told if e["type"] == "content_block_delta"] == ['{"x":', "1}", "{}"]


def test_a_call_without_an_id_gets_one() -> None:
    told = events(answering().feed(piece(0, "{}", name="f")))
    assert told[1]["content_block"]["id"]


def test_pieces_of_a_call_that_is_closed_cannot_be_shown_in_order() -> None:
    answer = answering()
    answer.feed(piece(0, "{", id="a", name="f") + piece(1, "{", id="b", name="g"))
    with pytest.raises(UpstreamError):
        answer.feed(piece(0, "}"))


def test_a_refusal_is_text() -> None:
    told = events(answering().feed(delta(refusal="No.")))
    assert told[-1]["delta"] == {"type": "text_delta", "text": "No."}


def test_characters_that_json_escapes_come_through() -> None:
    said = 'a"b\\c\nd\x07e\u2028 \U0001f600'
    told = events(answering().feed(delta(content=said)))
    assert told[-1]["delta"]["text"] == said


# the end


@pytest.mark.parametrize(
    ("parts", "reason", "sequence"),
    [
        ([delta("stop")], "end_turn", None),
        ([delta("stop", "END")], "stop_sequence", "END"),
        ([delta("length")], "max_tokens", None),
        ([delta("tool_calls")], "tool_use", None),
        ([delta("content_filter")], "refusal", None),
        ([delta("something_new")], "end_turn", None),
        # an engine that says "stop" after a call all the same
        ([piece(0, "{}", id="a", name="f"), delta("stop")], "tool_use", None),
        # a call that was cut off is none to run
        ([piece(0, "{", id="a", name="f"), delta("length")], "max_tokens", None),
    ],
)
def test_every_stop_reason(parts: list[bytes], reason: str, sequence: str | None) -> None:
    told = ending(*parts, usage(), DONE)
    assert told["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_an_answer_that_ended_before_its_own_limit_was_ended_by_the_context() -> None:
    assert (
        ending(delta("length"), usage(5), DONE, max_tokens=6)["delta"]["stop_reason"] == "model_context_window_exceeded"
    )
    assert ending(delta("length"), usage(5), DONE, max_tokens=5)["delta"]["stop_reason"] == "max_tokens"


def test_without_usage_the_end_still_comes() -> None:
    assert ending(delta("stop"), DONE)["usage"]["output_tokens"] == 0
    assert ending(delta("stop"))["delta"]["stop_reason"] == "end_turn"


def test_an_empty_answer_is_a_message_without_blocks() -> None:
    answer = answering()
    told = events(answer.feed(delta("stop") + usage() + DONE) + answer.finish())
    assert [e["type"] for e in told] == ["message_start", "message_delta", "message_stop"]
    assert told[0]["message"]["usage"]["input_tokens"] == 5


def test_nothing_follows_message_stop() -> None:
    answer = answering()
    answer.feed(delta(content="a") + delta("stop") + usage())
    assert answer.feed(DONE) == b""
    assert answer.finish() == b""


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    answer = answering()
    answer.feed(delta(content="a"))
    with pytest.raises(UpstreamError, match="before the answer was whole"):
        answer.finish()


def test_a_node_that_goes_on_after_its_end_is_not_believed() -> None:
    answer = answering()
    with pytest.raises(UpstreamError):
        answer.feed(delta(content="a") + delta("stop") + usage() + delta(reasoning_content="more"))


# faults


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "overloaded", "message": "full"}, Overloaded),
        ({"code": "context_length_exceeded", "message": "x", "n_prompt_tokens": 2, "n_ctx": 1}, ContextLengthExceeded),
        ({"code": "invalid_request_error", "message": "x"}, BadRequest),
        ({"message": "x"}, UpstreamError),
        ({}, UpstreamError),
    ],
)
def test_an_error_event_is_the_error(error: dict[str, Any], kind: type[HelexaError]) -> None:
    with pytest.raises(kind):
        answering().feed(event(error=error))


@pytest.mark.parametrize(
    "data", [b"data: nonsense\n\n", b"data: []\n\n", b'data: {"choices":7}\n\n', b"data: \xff\n\n"]
)
def test_what_is_no_chunk_ends_the_answer(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        answering().feed(data)


def test_line_ends_and_names_of_other_servers_are_understood() -> None:
    answer = answering()
    stream = delta(content="a").replace(b"\n", b"\r\n") + b"event: x\nid: 1\n" + delta(content="b")
    told = events(answer.feed(stream))
    assert [e["delta"]["text"] for e in told if e["type"] == "content_block_delta"] == ["a", "b"]


# the witness, and the other sink


def test_the_witness_hears_of_the_first_token_and_of_the_end() -> None:
    seen = Seen()
    answer = answering(witness=seen)
    answer.feed(progress())
    assert seen.tokens == 0
    answer.feed(delta(content="a"))
    assert seen.tokens == 1
    answer.feed(delta("stop") + usage())
    assert seen.end is not None
    told, finish_reason, timings = seen.end
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens, told.cached_tokens) == (9, 5, 4)
    assert (finish_reason, timings) == ("stop", {"predicted_n": 5})


def test_a_message_has_nothing_to_take_before_its_end() -> None:
    builder = MessageBuilder(message_id="msg_1", model="m")
    answer = Answer(builder, message_id="msg_1", max_tokens=5)
    assert answer.feed(progress() + delta(content="a")) == b""
    call = piece(0, '{"x": 1.10}', id="c", name="f")
    message = answer.feed(call + delta("tool_calls") + usage())
    assert b'"input":{"x": 1.10}' in message  # as the model wrote it
    assert answer.finish() == b""


def test_a_completion_in_place_of_a_chat_is_the_node_s_error() -> None:
    answer = Answer(EventWriter(message_id="msg_1", model="m"), message_id="msg_1", max_tokens=None)
    with pytest.raises(UpstreamError, match="completion"):
        answer.feed(event(choices=[{"index": 0, "text": "x"}]))
