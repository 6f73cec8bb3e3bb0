"""What we send is what the official SDK reads: strictly by its own types, and through its own accumulator."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from anthropic import NOT_GIVEN
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from jiter import from_json
from pydantic import TypeAdapter
from tests.helpers.anthropic_conversations import OBJECT, Streamed, answers, conversations
from tests.helpers.published import published

from helexa.core import sse
from helexa.core.dialects.anthropic_request import translate
from helexa.core.dialects.anthropic_sinks import EventWriter, MessageBuilder
from helexa.core.dialects.anthropic_stream import Answer
from helexa.core.dialects.partial_json import partial_object
from helexa.neuron.harness.openai_fields import read_chat

IDENTITY = {"message_id": "msg_1", "model": "smart"}
_event_type: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def streamed(data: bytes, cuts: list[int] | None = None, **more: Any) -> bytes:
    answer = Answer(EventWriter(**IDENTITY), message_id="msg_1", max_tokens=5, **more)
    places = sorted(min(cut, len(data)) for cut in cuts or [])
    parts = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    return b"".join(map(answer.feed, parts)) + answer.finish()


def whole(data: bytes) -> dict[str, Any]:
    answer = Answer(MessageBuilder(**IDENTITY), message_id="msg_1", max_tokens=5)
    return json.loads(answer.feed(data) + answer.finish())


def events(stream: bytes) -> list[dict[str, Any]]:
    found = []
    for event in sse.EventReader().feed(stream):
        data = json.loads(event.data)
        assert data["type"] == event.name
        found.append(data)
    return found


def accumulated(stream: bytes) -> Message:
    """As `client.messages.stream()` does it."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for data in events(stream):
        if data["type"] == "ping":
            continue
        event = _event_type.validate_python(data)
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers, output_format=NOT_GIVEN)
    assert snapshot is not None
    return Message.model_validate(snapshot.to_dict())


@given(answers())
def test_each_event_is_strictly_of_the_sdk_s_types_and_has_nothing_that_they_lack(answer: Streamed) -> None:
    for data in events(streamed(answer.data)):
        if data["type"] == "ping":
            continue
        parsed = _event_type.validate_json(json.dumps(data), strict=True)
        assert parsed.model_dump(mode="json", exclude_unset=True) == data
        assert not parsed.model_extra


@given(answers())
def test_the_whole_answer_is_strictly_of_the_sdk_s_type(answer: Streamed) -> None:
    data = whole(answer.data)
    parsed = Message.model_validate_json(json.dumps(data), strict=True)
    assert parsed.model_dump(mode="json", exclude_unset=True) == data
    assert not parsed.model_extra


@settings(deadline=None)  # the description is read with the first
@given(answers())
def test_all_that_is_sent_is_as_its_vendor_publishes_it(answer: Streamed) -> None:
    description = published("anthropic")
    description.answer_holds("POST", "/v1/messages", 200, whole(answer.data))
    for data in events(streamed(answer.data)):
        description.event_holds("/v1/messages", data)


@given(answers())
def test_collecting_the_stream_gives_the_whole_answer(answer: Streamed) -> None:
    assert accumulated(streamed(answer.data)) == Message.model_validate(whole(answer.data))


@given(answers(), st.lists(st.integers(0, 3000), max_size=8))
def test_any_cut_of_the_bytes_gives_the_same_events(answer: Streamed, cuts: list[int]) -> None:
    assert streamed(answer.data, cuts) == streamed(answer.data)


@given(answers())
def test_the_grammar_of_the_events_holds(answer: Streamed) -> None:
    """message_start, then blocks one after the other without a gap, message_delta, message_stop; pings between."""
    kinds = [(e["type"], e.get("index")) for e in events(streamed(answer.data)) if e["type"] != "ping"]
    assert kinds[0] == ("message_start", None)
    assert kinds[-2:] == [("message_delta", None), ("message_stop", None)]
    index, is_open = -1, False
    for kind, at in kinds[1:-2]:
        if kind == "content_block_start":
            assert not is_open
            index, is_open = index + 1, True
        assert is_open
        assert at == index
        if kind == "content_block_stop":
            is_open = False
        else:
            assert kind in ("content_block_start", "content_block_delta")
    assert not is_open


@given(answers(whole_calls=True))
def test_nothing_of_what_the_model_said_is_lost_or_out_of_order(answer: Streamed) -> None:
    blocks = accumulated(streamed(answer.data)).content
    assert len(blocks) == len(answer.pieces)
    for block, (kind, what) in zip(blocks, answer.pieces, strict=True):
        if kind == "text":
            assert block.type == "text"
            assert block.text == what
        elif kind == "reasoning":
            assert block.type == "thinking"
            assert block.thinking == what
            assert block.signature
        else:
            assert block.type == "tool_use"
            assert (block.id, block.name, block.input) == (what[0], what[1], json.loads(what[2]))


@given(answers(whole_calls=True))
def test_an_answer_that_is_sent_back_reaches_the_model_as_the_model_gave_it(answer: Streamed) -> None:
    message = accumulated(streamed(answer.data))
    said = [block.to_dict() for block in message.content]
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}
    body["messages"] += [{"role": "assistant", "content": said}]
    back = chat(body)["messages"][1]
    assert (back["content"] or "") == "".join(what for kind, what in answer.pieces if kind == "text")
    assert back.get("reasoning_content", "") == "".join(what for kind, what in answer.pieces if kind == "reasoning")
    calls = [what for kind, what in answer.pieces if kind == "call"]
    assert [(c["id"], c["function"]["name"]) for c in back.get("tool_calls", [])] == [c[:2] for c in calls]
    assert [json.loads(c["function"]["arguments"]) for c in back.get("tool_calls", [])] == [
        json.loads(c[2]) for c in calls
    ]


def chat(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(translate(json.dumps(body).encode()).body("m"))


@settings(deadline=None)
@given(conversations())
def test_every_conversation_is_one_that_the_neuron_takes(body: dict[str, Any]) -> None:
    read_chat(translate(json.dumps(body).encode()).body("m"), max_choices=4, context=32768)


@settings(deadline=None)
@given(conversations())
def test_texts_calls_and_results_reach_the_prompt_in_their_order(body: dict[str, Any]) -> None:
    told: list[Any] = []
    for message in chat(body)["messages"]:
        if message["role"] == "tool":
            told.append(("result", message["tool_call_id"]))
        elif message["role"] == "assistant":
            told.append(("said", message["content"] or ""))
            told += [("call", c["id"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
        elif message["role"] == "user":
            told += [
                ("image",) if p["type"] == "image_url" else ("text", p["text"]) for p in _parts(message["content"])
            ]
    assert told == _expected(body)


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found: list[dict[str, Any]] = content
    return found


def _expected(body: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    for message in body["messages"]:
        if message["role"] == "system":
            continue
        if message["role"] == "assistant":
            told.append(("said", "".join(b["text"] for b in message["content"] if b["type"] == "text")))
            told += [("call", b["id"], b["input"]) for b in message["content"] if b["type"] == "tool_use"]
            continue
        for block in message["content"]:
            if block["type"] == "tool_result":
                told.append(("result", block["tool_use_id"]))
            elif block["type"] == "text":
                told.append(("text", block["text"]))
            elif block["type"] == "image":
                told.append(("image",))
            else:
                told += [("text", t) for t in ([block["title"]] if block["title"] else [])]
                told.append(("text", block["source"]["data"]))
    return told


@given(OBJECT, st.data())
def test_arguments_that_were_cut_off_are_read_as_the_sdk_reads_them(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = text[: data.draw(st.integers(1, len(text)))]
    assert json.loads(msgspec.json.encode(partial_object(cut))) == from_json(cut.encode(), partial_mode=True)
