"""The neuron's stream as the events of Responses: order, cuts, ends and faults. Their types are judged elsewhere
(test_responses_round_trips)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.anthropic_conversations import JSON, TEXT

from helexa.core import sse
from helexa.core.dialects import neuron_chat
from helexa.core.dialects.responses_document import Document
from helexa.core.dialects.responses_input import try_unseal
from helexa.core.dialects.responses_sinks import EventWriter, ResponseBuilder
from helexa.core.dialects.responses_stream import Answer
from helexa.core.dialects.responses_text import TextArgument
from helexa.core.dialects.responses_tools import Called
from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    Overloaded,
    RateLimited,
    UpstreamError,
    UpstreamTimeout,
)

DONE = b"data: [DONE]\n\n"
CALLED = {"home__f": Called("f", "home"), "patch": Called("patch", is_custom=True)}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(finish: str | None = None, logprobs: Any = None, **members: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": members, "finish_reason": finish, "logprobs": logprobs}])


def piece(index: int, arguments: str, **first: Any) -> bytes:
    function = {"arguments": arguments} | ({"name": first.pop("name")} if "name" in first else {})
    return delta(tool_calls=[{"index": index, "function": function, **first}])


def usage(completion: int = 5) -> bytes:
    details = {"cached_tokens": 4}
    told = {
        "prompt_tokens": 9,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    return event(choices=[], usage=told, timings={"predicted_n": completion})


def progress(processed: int = 4) -> bytes:
    return event(choices=[], prompt_progress={"total": 9, "cache": 4, "processed": processed})


def document(clock: Callable[[], float] = lambda: 2.9, **form: bool) -> Document:
    return Document(key="hx1", model="m", created_at=1, echo=b'"tools":[]', clock=clock, **form)


def answering(**form: bool) -> Answer:
    return Answer(EventWriter(document(**form)), called=CALLED)


def events(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(found.data) for found in sse.EventReader().feed(stream) if not found.comment]


def kinds(stream: bytes) -> list[str]:
    return [found["type"].removeprefix("response.") for found in events(stream)]


def ending(*parts: bytes) -> dict[str, Any]:
    answer = answering()
    return events(answer.feed(b"".join(parts)) + answer.finish())[-1]


def output(*parts: bytes, **form: bool) -> list[dict[str, Any]]:
    answer = Answer(ResponseBuilder(document(**form)), called=CALLED)
    body = answer.feed(b"".join(parts) + delta("stop") + usage()) + answer.finish()
    found: list[dict[str, Any]] = json.loads(body)["output"]
    return found


# the beginning


def test_a_client_that_counts_events_alone_hears_one_every_fifteen_seconds() -> None:
    """First while no node says anything, then while one reads the prompt; then the answer goes on in the same count."""
    now = [100.0]
    writer = EventWriter(document(clock=lambda: now[0]))
    told = [writer.heartbeat(b"loading: 43 %")]
    for _ in range(31):
        now[0] += 1
        told.append(writer.heartbeat(b""))
    said = [[found.name or found.data for found in sse.EventReader().feed(part)] for part in told]
    assert said[0] == ["response.created", "response.in_progress", b"loading: 43 %"]
    assert [at for at, names in enumerate(said) if names == ["response.in_progress"]] == [15, 31]
    assert {tuple(names) for names in said[1:]} == {(b"",), ("response.in_progress",)}
    answer = Answer(writer.anew(), called=CALLED)
    for number in range(40):
        now[0] += 1
        told.append(answer.feed(progress(number)))
    told += [answer.feed(part) for part in (delta(content="x"), delta("stop"), usage(), DONE)]
    found = events(b"".join(told))
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    kinds = [one["type"] for one in found]
    assert (kinds.count("response.created"), kinds.count("response.in_progress"), kinds[-1]) == (
        1,
        5,
        "response.completed",
    )


def test_what_an_attempt_did_not_send_the_next_one_says() -> None:
    first = EventWriter(document())
    lost = Answer(first, called=CALLED)
    with pytest.raises(UpstreamError):
        lost.feed(progress() + event(error={"message": "no", "code": "x"}))
    assert [one["type"] for one in events(Answer(first.anew(), called=CALLED).feed(progress()))] == [
        "response.created",
        "response.in_progress",
    ]


def test_a_stream_that_fails_after_heartbeats_goes_on_in_their_count() -> None:
    writer = EventWriter(document())
    found = events(writer.heartbeat(b"") + writer.fail(Overloaded("busy")))
    assert [(one["type"], one["sequence_number"]) for one in found] == [
        ("response.created", 0),
        ("response.in_progress", 1),
        ("response.failed", 2),
        ("error", 3),
    ]


def test_the_response_begins_with_the_first_progress_and_waits_in_comments() -> None:
    answer = answering()
    first = answer.feed(progress())
    assert kinds(first) == ["created", "in_progress"]
    created = events(first)[0]["response"]
    assert (created["id"], created["status"], created["output"]) == ("resp_hx1", "in_progress", [])
    assert answer.feed(progress(8)) == answer.feed(b": still here\n\n") == b":\n\n"


def test_heartbeats_before_the_beginning_are_the_relay_s() -> None:
    assert answering().feed(b": loading\n\n") == b""


def test_an_engine_that_tells_no_progress_begins_with_its_first_chunk() -> None:
    assert kinds(answering().feed(delta(role="assistant", content=None))) == ["created", "in_progress"]


# items


def test_a_text_is_one_part_of_a_message() -> None:
    answer = answering()
    told = answer.feed(delta(content="Hel") + delta(content="lo") + delta("stop") + usage()) + answer.finish()
    assert kinds(told)[2:] == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (True, ["reasoning_summary_part.added", "reasoning_summary_text.delta", "reasoning_summary_text.done",
                "reasoning_summary_part.done"]),
        (False, ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]),
    ],
)  # fmt: skip
def test_reasoning_is_an_item_of_its_own_before_the_text(shown: bool, expected: list[str]) -> None:
    told = answering(show_summary=shown).feed(delta(reasoning_content="Hm.") + delta(content="So"))
    assert kinds(told)[2:] == [
        "output_item.added", *expected, "output_item.done", "output_item.added", "content_part.added",
        "output_text.delta",
    ]  # fmt: skip


def test_what_a_client_keeps_of_reasoning_holds_it() -> None:
    (item,) = output(delta(reasoning_content="Hm, naïve."), seal=True, show_summary=True)
    assert try_unseal(item["encrypted_content"]) == "Hm, naïve."
    assert item["summary"] == [{"type": "summary_text", "text": "Hm, naïve."}]
    (plain,) = output(delta(reasoning_content="Hm."))
    assert "encrypted_content" not in plain
    assert (plain["summary"], plain["content"]) == ([], [{"type": "reasoning_text", "text": "Hm."}])


def test_one_chunk_may_hold_reasoning_text_and_a_call() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "g", "arguments": "{}"}}
    for before in (b"", delta(content="x")):
        items = output(before + delta(reasoning_content="a", content="b", tool_calls=[call]))
        assert [item["type"] for item in items][-3:] == ["reasoning", "message", "function_call"]
    items = output(delta(content="a") + delta(content="b", tool_calls=[call]))
    assert items[0]["content"][0]["text"] == "ab"
    assert items[1]["call_id"] == "c"


def test_parallel_calls_are_items_one_after_the_other() -> None:
    items = output(piece(0, "", id="a", name="g"), piece(0, '{"x":'), piece(0, "1}"), piece(1, "{}", id="b", name="h"))
    assert [(i["call_id"], i["name"], i["arguments"], i["status"]) for i in items] == [
        ("a", "g", '{"x":1}', "completed"),
        ("b", "h", "{}", "completed"),
    ]
    assert [item["id"] for item in items] == ["fc_hx1o0", "fc_hx1o1"]


def test_calls_come_back_under_the_client_s_own_names() -> None:
    items = output(piece(0, "{}", id="a", name="home__f"), piece(1, '{"input": "x\\ny"}', name="patch"))
    assert items[0]["name"] == "f"
    assert items[0]["namespace"] == "home"
    assert items[1] == {
        "id": "ctc_hx1o1", "type": "custom_tool_call", "call_id": "call_hx1o1", "name": "patch", "input": "x\ny",
    }  # fmt: skip


def test_pieces_of_a_call_that_is_closed_cannot_be_shown_in_order() -> None:
    answer = answering()
    answer.feed(piece(0, "{", id="a", name="f") + piece(1, "{", id="b", name="g"))
    with pytest.raises(UpstreamError):
        answer.feed(piece(0, "}"))


def test_a_refusal_is_a_part_of_the_message() -> None:
    (item,) = output(delta(content="Well, "), delta(refusal="no."))
    assert [part["type"] for part in item["content"]] == ["output_text", "refusal"]
    assert item["content"][1]["refusal"] == "no."
    answer = answering()
    told = answer.feed(delta(content="Well") + delta(refusal="no.") + delta("stop") + usage())
    indices = {e["type"]: e["content_index"] for e in events(told) if "content_index" in e}
    assert (indices["response.output_text.done"], indices["response.refusal.done"]) == (0, 1)


def test_log_probabilities_stand_in_the_events_and_in_the_text() -> None:
    token = {
        "token": "a",
        "bytes": [97],
        "logprob": -0.5,
        "top_logprobs": [{"token": "b", "logprob": -1, "bytes": None}],
    }
    answer = answering()
    told = events(answer.feed(delta(content="a", logprobs={"content": [token]}) + delta("stop") + usage()))
    short = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}
    assert [e["logprobs"] for e in told if e["type"].startswith("response.output_text")] == [[short], [short]]
    (part,) = told[-1]["response"]["output"][0]["content"]
    assert part["logprobs"][0]["bytes"] == [97]
    assert part["logprobs"][0]["top_logprobs"][0]["bytes"] == []


def test_characters_that_json_escapes_come_through() -> None:
    said = 'a"b\\c\nd\x07e\u2028 \U0001f600'
    told = events(answering().feed(delta(content=said)))
    assert told[-1]["delta"] == said


# the text of a custom tool


@given(text=TEXT, cuts=st.lists(st.integers(0, 200), max_size=6), ascii_only=st.booleans(), spaces=st.booleans())
def test_the_text_is_the_same_however_its_arguments_were_cut(
    text: str, cuts: list[int], ascii_only: bool, spaces: bool
) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only, indent=1 if spaces else None)
    argument = TextArgument()
    places = sorted(min(cut, len(arguments)) for cut in cuts)
    parts = [arguments[a:b] for a, b in zip([0, *places], [*places, len(arguments)], strict=True)]
    pieces = [argument.feed(part) for part in parts]
    assert "".join(pieces) + argument.end() == text
    assert all(piece.encode() or not piece for piece in pieces)  # no half characters


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"note": 1, "input": "a"}', "a"),
        ('{"text": "a"}', '{"text": "a"}'),
        ("no JSON", "no JSON"),
        ("", ""),
        ('{"input": "cut o', "cut o"),
        ('{"input": "cut \\u00', "cut "),
        ('{"input": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"input": "line\nline"}', "line\nline"),
    ],
)
def test_arguments_of_another_form_are_not_lost(arguments: str, text: str) -> None:
    argument = TextArgument()
    assert argument.feed(arguments) + argument.end() == text


@given(JSON)
def test_any_json_has_a_text(value: Any) -> None:
    argument = TextArgument()
    arguments = json.dumps(value)
    assert argument.feed(arguments) + argument.end() == arguments or isinstance(value, dict)


# the end


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("something_new", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_every_end(finish: str, status: str, reason: str | None) -> None:
    last = ending(delta(content="a"), delta(finish), usage(), DONE)
    response = last["response"]
    assert last["type"] == f"response.{status}"
    assert response["status"] == response["output"][0]["status"] == status
    assert response["incomplete_details"] == ({"reason": reason} if reason else None)
    assert response["completed_at"] == (2 if status == "completed" else None)
    assert response["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 14,
    }


def test_without_usage_the_end_still_comes() -> None:
    assert "usage" not in ending(delta("stop"), DONE)["response"]
    assert ending(delta("stop"))["type"] == "response.completed"


def test_an_empty_answer_has_no_output() -> None:
    answer = answering()
    assert kinds(answer.feed(delta("stop") + usage() + DONE) + answer.finish()) == [
        "created",
        "in_progress",
        "completed",
    ]


def test_nothing_follows_the_end() -> None:
    answer = answering()
    answer.feed(delta(content="a") + delta("stop") + usage())
    assert answer.feed(DONE) == b""
    assert answer.finish() == b""


def test_a_node_that_goes_on_after_its_end_is_not_believed() -> None:
    answer = answering()
    with pytest.raises(UpstreamError):
        answer.feed(delta(content="a") + delta("stop") + usage() + delta(reasoning_content="more"))


# faults


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UpstreamTimeout("x"), "server_error"),
        (Overloaded("x"), "server_error"),
        (RateLimited("x"), "rate_limit_exceeded"),
        (BadRequest("x", param="input"), "invalid_prompt"),
        (ContextLengthExceeded("m", 2, 1), "context_length_exceeded"),
    ],
)
def test_a_stream_that_fails_says_so_twice(error: HelexaError, code: str) -> None:
    sink = EventWriter(document())
    answer = Answer(sink, called={})
    before = answer.feed(delta(reasoning_content="Hm.") + delta(content="Hel") + delta(content="lo"))
    *_, failed, told = events(before + sink.fail(error))
    response = failed["response"]
    assert (failed["type"], response["status"], response["error"]["code"]) == ("response.failed", "failed", code)
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["output"][1]["content"][0]["text"] == "Hello"
    assert told == {
        "type": "error", "code": error.code, "message": error.message, "param": error.param,
        "sequence_number": failed["sequence_number"] + 1,
    }  # fmt: skip
    assert sink.response is not None
    assert json.loads(sink.response) == response


def test_a_stream_that_fails_before_its_beginning_has_one_all_the_same() -> None:
    assert kinds(EventWriter(document()).fail(Overloaded("x"))) == ["created", "in_progress", "failed", "error"]


def test_a_response_that_has_ended_does_not_fail_any_more() -> None:
    sink = EventWriter(document())
    with pytest.raises(UpstreamError) as caught:
        Answer(sink, called={}).feed(delta(content="a") + delta("stop") + usage() + delta(reasoning_content="more"))
    assert kinds(sink.fail(caught.value))[-2:] == ["completed", "error"]
    assert sink.response is not None
    assert json.loads(sink.response)["status"] == "completed"


@pytest.mark.parametrize("parts", [[], [piece(0, '{"in', name="patch")], [piece(0, "{", name="g")]])
def test_an_answer_that_broke_off_is_known_as_far_as_it_came(parts: list[bytes]) -> None:
    sink = ResponseBuilder(document())
    answer = Answer(sink, called=CALLED)
    answer.feed(delta(content="Hello") + b"".join(parts))
    kept = json.loads(sink.broken_off())
    assert kept["status"] == "incomplete"
    assert kept["output"][0]["content"][0]["text"] == "Hello"
    assert len(kept["output"]) == 1 + len(parts)


def test_an_error_event_names_the_field_as_the_client_does() -> None:
    answer = Answer(EventWriter(document()), called={}, naming=lambda param: f"my {param}")
    with pytest.raises(BadRequest, match="`my top_p` is wrong") as caught:
        answer.feed(event(error={"code": "invalid_request_error", "message": "`top_p` is wrong", "param": "top_p"}))
    assert caught.value.param == "my top_p"


class Seen:
    def __init__(self) -> None:
        self.tokens = 0
        self.end: tuple[neuron_chat.Usage | None, str | None, dict[str, Any] | None] | None = None

    def first_token(self) -> None:
        self.tokens += 1

    def ended(self, usage: neuron_chat.Usage | None, finish_reason: str | None, timings: dict[str, Any] | None) -> None:
        self.end = usage, finish_reason, timings


def test_the_witness_hears_of_the_first_token_and_of_the_end() -> None:
    seen = Seen()
    answer = Answer(EventWriter(document()), called={}, witness=seen)
    answer.feed(progress())
    assert seen.tokens == 0
    answer.feed(delta(content="a"))
    assert seen.tokens == 1
    answer.feed(delta("stop") + usage())
    assert seen.end is not None
    assert seen.end[1:] == ("stop", {"predicted_n": 5})
