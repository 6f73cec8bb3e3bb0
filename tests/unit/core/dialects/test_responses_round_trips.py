"""What we send is what the official SDK reads: strictly by its own types, and through its own accumulator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai._models import construct_type_unchecked
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.helpers.anthropic_conversations import Streamed, answers
from tests.helpers.published import published
from tests.helpers.responses_conversations import conversations

from helexa.core import sse
from helexa.core.dialects.responses_document import Document
from helexa.core.dialects.responses_items import try_listed
from helexa.core.dialects.responses_request import read, translate
from helexa.core.dialects.responses_sinks import EventWriter, ResponseBuilder
from helexa.core.dialects.responses_stream import Answer
from helexa.core.dialects.responses_tools import Called
from helexa.neuron.harness.openai_fields import read_chat

ECHO = translate(read(b'{"input":"x"}'), b'{"input":"x"}').echo
DONE = frozenset({"response.completed", "response.incomplete"})
_item_type: TypeAdapter[Any] = TypeAdapter(ResponseItem)
_event_type: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

FORMS = st.fixed_dictionaries({"show_summary": st.booleans(), "seal": st.booleans()})


def document(**form: bool) -> Document:
    return Document(key="hx1", model="smart", created_at=1, echo=ECHO, clock=lambda: 2.0, **form)


def streamed(
    data: bytes, cuts: list[int] | None = None, called: Mapping[str, Called] | None = None, **form: bool
) -> bytes:
    answer = Answer(EventWriter(document(**form)), called=called or {})
    places = sorted(min(cut, len(data)) for cut in cuts or [])
    parts = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    return b"".join(map(answer.feed, parts)) + answer.finish()


def whole(data: bytes, **form: bool) -> dict[str, Any]:
    answer = Answer(ResponseBuilder(document(**form)), called={})
    found: dict[str, Any] = json.loads(answer.feed(data) + answer.finish())
    return found


def events(stream: bytes) -> list[dict[str, Any]]:
    found = []
    for event in sse.EventReader().feed(stream):
        if event.comment:
            continue
        data = json.loads(event.data)
        assert data["type"] == event.name
        found.append(data)
    return found


def accumulated(stream: bytes) -> Any:
    """As `client.responses.stream()` does it; the snapshot, and the response that it ends with."""
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for data in events(stream):
        state.handle_event(construct_type_unchecked(value=data, type_=ResponseStreamEvent))
    return state


def strictly(data: Any, kind: Any) -> None:
    parsed = kind.validate_json(json.dumps(data), strict=True)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == data
    assert not parsed.model_extra


@given(answers(), FORMS)
def test_each_event_is_strictly_of_the_sdk_s_types_and_has_nothing_that_they_lack(
    answer: Streamed, form: dict[str, bool]
) -> None:
    for data in events(streamed(answer.data, **form)):
        # OpenAI's published description has both, and the types lack them
        data.get("response", {}).pop("store", None)
        if data["type"] == "response.function_call_arguments.done":
            assert data.pop("name")
        strictly(data, _event_type)


@given(answers(), FORMS)
def test_the_whole_answer_is_strictly_of_the_sdk_s_type(answer: Streamed, form: dict[str, bool]) -> None:
    data = whole(answer.data, **form)
    assert data.pop("store") is True
    strictly(data, TypeAdapter(Response))


@settings(deadline=None)  # the description is read with the first
@given(answers(), FORMS)
def test_all_that_is_sent_is_as_its_vendor_publishes_it(answer: Streamed, form: dict[str, bool]) -> None:
    description = published("openai")
    description.answer_holds("POST", "/v1/responses", 200, whole(answer.data, **form))
    for data in events(streamed(answer.data, **form)):
        description.event_holds("/v1/responses", data)


@given(answers(), FORMS)
def test_the_stream_ends_with_the_whole_answer(answer: Streamed, form: dict[str, bool]) -> None:
    last = events(streamed(answer.data, **form))[-1]
    assert last["type"] in DONE
    assert last["response"] == whole(answer.data, **form)


@given(answers(), FORMS)
def test_collecting_the_items_of_the_stream_gives_the_output(answer: Streamed, form: dict[str, bool]) -> None:
    told = events(streamed(answer.data, **form))
    items = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert items == whole(answer.data, **form)["output"]
    for index, item in enumerate(items):
        deltas = "".join(e["delta"] for e in told if e.get("output_index") == index and "delta" in e)
        assert deltas == said(item)


def said(item: dict[str, Any]) -> str:
    for field in ("arguments", "input"):
        if field in item:
            return str(item[field])
    return "".join(part["text"] for part in [*(item.get("summary") or ()), *(item.get("content") or ())])


@given(answers())
def test_the_sdk_s_accumulator_ends_with_the_whole_answer(answer: Streamed) -> None:
    state = accumulated(streamed(answer.data))
    if answer.finish_reason == "length":
        assert state._completed_response is None
    else:
        response = Response.model_validate(whole(answer.data))
        assert state._completed_response.output_text == response.output_text
        assert [item.type for item in state._completed_response.output] == [item.type for item in response.output]


@given(answers(), st.lists(st.integers(0, 3000), max_size=8), FORMS)
def test_any_cut_of_the_bytes_gives_the_same_events(answer: Streamed, cuts: list[int], form: dict[str, bool]) -> None:
    assert streamed(answer.data, cuts, **form) == streamed(answer.data, **form)


@given(answers(), FORMS)
def test_the_grammar_of_the_events_holds(answer: Streamed, form: dict[str, bool]) -> None:
    """created, in_progress, then items one after the other without a gap, each added and done; the end. Numbers count
    up by one."""
    told = events(streamed(answer.data, **form))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    index, is_open, parts = -1, False, 0
    for event in told[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert not is_open
            index, is_open, item_id = index + 1, True, event["item"]["id"]
        assert is_open
        assert event["output_index"] == index
        assert event.get("item_id", item_id) == item_id
        parts += kind.endswith("part.added") - kind.endswith("part.done")
        assert parts in (0, 1)
        if kind == "response.output_item.done":
            assert event["item"]["id"] == item_id
            assert not parts
            is_open = False
    assert not is_open


@given(answers(whole_calls=True), FORMS)
def test_nothing_of_what_the_model_said_is_lost_or_out_of_order(answer: Streamed, form: dict[str, bool]) -> None:
    output = whole(answer.data, **form)["output"]
    assert len(output) == len(answer.pieces)
    for item, (kind, what) in zip(output, answer.pieces, strict=True):
        if kind == "call":
            assert (item["call_id"], item["name"], item["arguments"]) == what
        else:
            assert item["type"] == {"text": "message", "reasoning": "reasoning"}[kind]
            assert said(item) == what


@given(answers(whole_calls=True), FORMS)
def test_an_answer_that_is_sent_back_reaches_the_model_as_the_model_gave_it(
    answer: Streamed, form: dict[str, bool]
) -> None:
    body = {"input": [{"role": "user", "content": "?"}, *whole(answer.data, **form)["output"]]}
    back = chat(body)["messages"][1:]
    texts = "".join(message["content"] or "" for message in back)
    assert texts == "".join(what for kind, what in answer.pieces if kind == "text")
    reasoning = "".join(message.get("reasoning_content", "") for message in back)
    assert reasoning == "".join(what for kind, what in answer.pieces if kind == "reasoning")
    calls = [call for message in back for call in message.get("tool_calls", [])]
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
        what for kind, what in answer.pieces if kind == "call"
    ]


def chat(body: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    found: dict[str, Any] = json.loads(translate(read(raw), raw).body("m"))
    return found


@settings(deadline=None)
@given(conversations())
def test_every_conversation_is_one_that_the_neuron_takes(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    read_chat(translate(read(raw), raw).body("m"), max_choices=4, context=32768)


@settings(deadline=None)
@given(conversations(), answers())
def test_what_the_answer_repeats_of_the_request_is_strictly_of_the_sdk_s_type(
    body: dict[str, Any], answer: Streamed
) -> None:
    raw = json.dumps(body, indent=1).encode()  # an event's data has no line breaks all the same
    made = translate(read(raw), raw)
    shape = Document(key="hx1", model="m", created_at=1, echo=made.echo, clock=lambda: 2.0)
    data = events(Answer(EventWriter(shape), called=made.called).feed(answer.data))[-1]["response"]
    del data["store"]
    strictly(data, TypeAdapter(Response))
    for name in ("instructions", "temperature", "top_p", "max_output_tokens", "user", "prompt_cache_key"):
        assert data.get(name) == body.get(name)
    assert data["metadata"] == body.get("metadata", {})


@settings(deadline=None)
@given(conversations())
def test_texts_calls_and_results_reach_the_prompt_in_their_order(body: dict[str, Any]) -> None:
    told: list[Any] = []
    for message in chat(body)["messages"]:
        if message["role"] == "tool":
            told.append(("result", message["tool_call_id"]))
        elif message["role"] == "assistant":
            told += [("said", message["content"])] if message["content"] else []
            told += [
                ("call", c["id"], c["function"]["name"], c["function"]["arguments"])
                for c in message.get("tool_calls", [])
            ]
        else:
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            told += [(message["role"], p.get("text", "an image")) for p in parts]
    assert told == _expected(body)


@settings(deadline=None)
@given(conversations())
def test_what_was_asked_is_listed_in_items_of_the_sdk_s_types(body: dict[str, Any]) -> None:
    items = json.loads(try_listed(json.dumps(body).encode(), "hx1") or b"")
    given_input = body["input"]
    assert len(items) == (1 if isinstance(given_input, str) else len(given_input))
    for item in items:
        _item_type.validate_json(json.dumps(item), strict=True)


def _expected(body: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    if body.get("instructions"):
        told.append(("system", body["instructions"]))
    given_input = body["input"]
    items = [{"role": "user", "content": given_input}] if isinstance(given_input, str) else given_input
    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and item["role"] == "assistant":
            content = item["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            told += [("said", text)] if text else []
        elif kind == "message":
            role = "user" if item["role"] == "user" else "system"
            content = item["content"]
            parts = content if isinstance(content, list) else [{"type": "input_text", "text": content}]
            told += [(role, part.get("text", "an image")) for part in parts] or [(role, "")]
        elif kind == "function_call":
            name = f"{item['namespace']}__{item['name']}" if "namespace" in item else item["name"]
            told.append(("call", item["call_id"], name, item["arguments"] or "{}"))
        elif kind == "custom_tool_call":
            arguments = json.dumps({"input": item["input"]}, ensure_ascii=False, separators=(",", ":"))
            told.append(("call", item["call_id"], item["name"], arguments))
        elif kind.endswith("_output"):
            told.append(("result", item["call_id"]))
    return told
