"""Answers repaired: each mend, streamed and whole, however the bytes were cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import engine_events as engine
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange, session

from helexa.core import sse
from helexa.core.errors import ContextLengthExceeded, UpstreamError
from helexa.core.relay.contract import Mend
from helexa.neuron.harness.collect import Collector

MESSAGES = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
FORCED = {"messages": MESSAGES, "tools": [ADD], "tool_choice": "required"}


def mend_of(body: dict[str, Any], path: str = CHAT, abilities: tuple[str, ...] = ("chat", "tools")) -> Mend:
    mend = session(abilities=abilities).prepare(exchange(body, path)).mend
    assert mend is not None
    return mend


def through(mend: Mend, stream: bytes, cuts: Sequence[int] = ()) -> bytes:
    at = [0, *sorted(cuts), len(stream)]
    return b"".join(mend.feed(stream[a:b]) for a, b in pairwise(at)) + mend.finish()


def streamed(body: dict[str, Any], events: Sequence[Any], path: str = CHAT, **more: Any) -> list[Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    out = through(mend_of(options | body, path, **more), engine.frames(events))
    assert out.endswith(engine.DONE)
    return [json.loads(event.data) for event in sse.EventReader().feed(out.removesuffix(engine.DONE))]


def whole(body: dict[str, Any], events: Sequence[Any], path: str = CHAT, **more: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(through(mend_of(body, path, **more), engine.frames(events)))
    return answer


def collected(events: Sequence[Any]) -> dict[str, Any]:
    collector = Collector()
    for event in events:
        collector.add(event)
    return collector.answer()


# Every kind of mended request: what was asked, and what the engine streams for it.
PLAIN_TEXT = [engine.role(), *engine.text("Hel", "lo "), engine.delta(finish="stop"), engine.usage(4)]
STOP_TEXT = [*PLAIN_TEXT[:3], engine.delta(finish="stop") | engine.stopped("you"), engine.usage(4)]
CALL_TEXT = [
    engine.role(),
    *engine.text("{\n", ' "name"', ': "add",', ' "arguments": {', '"a": "}\\""', ', "b": [1, {}]', "}", "\n}"),
    engine.delta(finish="stop"),
    engine.usage(9),
]
TWO_CHOICES = [
    engine.role(1),
    *engine.text("x", index=1),
    engine.role(0),
    *engine.text("y", "é", index=0),
    engine.delta(1, "length"),
    engine.usage(1, cached=6),
    engine.delta(0, "stop"),
    engine.usage(3, cached=5),
]
TWO_PROMPTS = [
    None,
    engine.completion(1, "b"),
    engine.completion(0, "a"),
    engine.completion(1, "", "length", usage=engine.usage_of(2, 3, 1), timings=engine.timings(2, 3, 1)),
    engine.completion(0, "", "stop", usage=engine.usage_of(4, 5), timings=engine.timings(4, 5)),
]
THOUGHTS = [
    engine.role(),
    engine.delta(reasoning_content="Let me ") | {"timings": engine.timings(3)},
    engine.delta(reasoning_content="see.") | {"timings": engine.timings(5)},
    engine.delta(content="Yes.") | {"timings": engine.timings(9)},
    engine.delta(finish="stop"),
    engine.usage(11),
]
LOGPROBS = [
    engine.completion(0, " the", logprobs={"content": [engine.token(" the", -0.5, (" a", -1.5))]}),
    engine.completion(0, " é", logprobs={"content": [engine.token(" é", -0.25, (" e", -2.0))]}),
    engine.completion(0, "", "length", usage=engine.usage_of(2), timings=engine.timings(2)),
]
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...], list[Any]]] = {
    "stop": ({"messages": MESSAGES, "stop": ["you"]}, CHAT, ("chat",), STOP_TEXT),
    "forced": (FORCED, CHAT, ("chat", "tools"), CALL_TEXT),
    "forced, tools as text": (FORCED, CHAT, ("chat",), CALL_TEXT),
    "auto, tools as text": (FORCED | {"tool_choice": "auto"}, CHAT, ("chat",), CALL_TEXT),
    "text, tools as text": (FORCED | {"tool_choice": "auto"}, CHAT, ("chat",), PLAIN_TEXT),
    "choices": ({"messages": MESSAGES, "n": 2}, CHAT, ("chat",), TWO_CHOICES),
    "choices, stop": ({"messages": MESSAGES, "n": 2, "stop": "x"}, CHAT, ("chat",), TWO_CHOICES),
    "prompts": ({"prompt": ["a", "b"]}, COMPLETIONS, ("chat",), TWO_PROMPTS),
    "prompts, echo": ({"prompt": ["a", "b"], "echo": True}, COMPLETIONS, ("chat",), TWO_PROMPTS),
    "reasoning": ({"messages": MESSAGES}, CHAT, ("chat", "reasoning"), THOUGHTS),
    "logprobs": ({"prompt": "a", "logprobs": 1}, COMPLETIONS, ("chat",), LOGPROBS),
}


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_cut_of_the_bytes_gives_the_same_stream(name: str, data: st.DataObject) -> None:
    body, path, abilities, events = CASES[name]
    stream = engine.frames(events)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    uncut = through(mend_of(asked, path, abilities), stream)
    assert through(mend_of(asked, path, abilities), stream, cuts) == uncut


@pytest.mark.parametrize("name", CASES)
def test_each_cut_inside_an_event_gives_the_same_whole_answer(name: str) -> None:
    body, path, abilities, events = CASES[name]
    stream = engine.frames(events)
    uncut = through(mend_of(body, path, abilities), stream)
    for cut in range(0, len(stream), 13):
        assert through(mend_of(body, path, abilities), stream, [cut]) == uncut


@pytest.mark.parametrize("name", CASES)
def test_a_stream_put_together_is_the_whole_answer(name: str) -> None:
    body, path, abilities, events = CASES[name]
    put_together = collected(streamed(body, events, path, abilities=abilities))
    assert put_together == whole(body, events, path, abilities=abilities)


@pytest.mark.parametrize("name", CASES)
def test_what_helped_the_mend_is_not_shown(name: str) -> None:
    body, path, abilities, events = CASES[name]
    shown = json.dumps(streamed(body, events, path, abilities=abilities))
    assert "__verbose" not in shown
    assert "the prompt again" not in shown


def test_the_stop_string_that_hit_stands_beside_the_finish_reason() -> None:
    choice = whole({"messages": MESSAGES, "stop": ["you"]}, STOP_TEXT)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "you")
    *_, ended, told = streamed({"messages": MESSAGES, "stop": ["you"]}, STOP_TEXT)
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["stop_reason"]) == ("stop", "you")
    assert told["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("word", [None, "<|template's own|>"])
def test_an_end_without_a_stop_string_of_the_request_has_none(word: str | None) -> None:
    events = [engine.role(), *engine.text("a"), engine.delta(finish="stop") | engine.stopped(word), engine.usage(1)]
    assert whole({"messages": MESSAGES, "stop": ["you"]}, events)["choices"][0]["stop_reason"] is None


def test_an_end_waits_for_the_reason_that_comes_after_it() -> None:
    late = [*engine.text("a"), engine.delta(finish="stop"), engine.usage(1) | engine.stopped("you")]
    _, ended, told = streamed({"messages": MESSAGES, "stop": ["you"]}, late)
    assert ended["choices"][0]["stop_reason"] == "you"
    assert "usage" in told


def test_each_choice_has_the_stop_string_that_ended_it() -> None:
    events = [
        engine.delta(1, "stop") | engine.stopped("b", 1),
        engine.delta(0, "stop") | engine.stopped("a", 0),
    ]
    choices = whole({"messages": MESSAGES, "n": 2, "stop": ["a", "b"]}, events)["choices"]
    assert [c["stop_reason"] for c in choices] == ["a", "b"]


def test_one_usage_counts_every_choice_and_the_prompt_once() -> None:
    *_, last = streamed({"messages": MESSAGES, "n": 2}, TWO_CHOICES)
    assert last["choices"] == []
    assert last["usage"] == engine.usage_of(4, 7, 5)
    assert (last["timings"]["predicted_n"], last["timings"]["predicted_ms"]) == (4, 60.0)
    answer = whole({"messages": MESSAGES, "n": 2}, TWO_CHOICES)
    assert answer["usage"] == engine.usage_of(4, 7, 5)
    assert [c["message"]["content"] for c in answer["choices"]] == ["yé", "x"]
    assert answer["object"] == "chat.completion"


def test_an_echo_begins_each_choice_with_its_prompt() -> None:
    body = {"prompt": ["One", "Two"], "echo": True, "n": 1}
    progress = engine.completion(0, "", prompt_progress={"total": 5, "cache": 0, "processed": 5})
    served = session().prepare(exchange(body, COMPLETIONS))
    assert served.mend is not None
    answer = json.loads(served.mend.feed(engine.frames([progress, *TWO_PROMPTS])) + served.mend.finish())
    assert [choice["text"] for choice in answer["choices"]] == ["Onea", "Twob"]


def test_usage_of_several_prompts_counts_each_prompt() -> None:
    answer = whole({"prompt": ["a", "b"]}, TWO_PROMPTS, COMPLETIONS)
    assert answer["usage"] == engine.usage_of(6, 8, 1)
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("a", "stop"), ("b", "length")]


def test_several_prompts_with_several_choices_count_each_prompt_once() -> None:
    events = [
        engine.completion(i, "x", "length", usage=engine.usage_of(1, prompt), timings=engine.timings(1, prompt))
        for i, prompt in enumerate((3, 3, 5, 5))
    ]
    assert whole({"prompt": ["a", "b"], "n": 2}, events, COMPLETIONS)["usage"] == engine.usage_of(4, 8)


def test_a_stream_of_several_prompts_tells_usage_only_when_asked() -> None:
    silent = {"prompt": ["a", "b"], "stream": True, "stream_options": None}
    events = streamed(silent, TWO_PROMPTS, COMPLETIONS)
    assert len(events) == 4  # `data: null` is gone as well
    assert not any("usage" in event for event in events)


def test_reasoning_tokens_are_what_was_generated_at_the_last_thought() -> None:
    answer = whole({"messages": MESSAGES}, THOUGHTS, abilities=("chat", "reasoning"))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "Let me see.",
    }
    events = streamed({"messages": MESSAGES}, THOUGHTS, abilities=("chat", "reasoning"))
    assert [("timings" in e) for e in events] == [False] * 5 + [True]


def test_per_token_timings_stay_for_a_client_that_asked() -> None:
    body = {"messages": MESSAGES, "timings_per_token": True}
    events = streamed(body, THOUGHTS, abilities=("chat", "reasoning"))
    assert sum("timings" in e for e in events) == 4


def test_log_probabilities_of_completions_have_their_own_form() -> None:
    choice = whole({"prompt": "a", "logprobs": 1}, LOGPROBS, COMPLETIONS)["choices"][0]
    assert choice["logprobs"] == {
        "tokens": [" the", " é"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{" the": -0.5}, {" é": -0.25}],
        "text_offset": [0, 4],
    }


def test_log_probabilities_without_alternatives_show_none() -> None:
    event = engine.delta(content="a")
    event["choices"][0]["logprobs"] = {"content": [engine.token("a", -1.0)]}
    answer = whole({"messages": MESSAGES, "logprobs": True}, [event])
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_progress_of_a_prefill_is_no_part_of_a_whole_answer() -> None:
    progress = engine.role() | {"prompt_progress": {"total": 7, "cache": 0, "processed": 3, "time_ms": 1}}
    body = {"messages": MESSAGES}
    assert whole(body, [progress, progress, *PLAIN_TEXT]) == whole(body, PLAIN_TEXT)


def test_an_answer_of_many_events_may_come_at_once() -> None:
    stream = engine.frames([engine.role(), *engine.text("x") * 20_000, engine.delta(finish="length")])
    answer = json.loads(through(mend_of({"messages": MESSAGES}), stream))
    assert len(answer["choices"][0]["message"]["content"]) == 20_000


def test_comments_pass_in_a_stream_and_not_into_a_whole_answer() -> None:
    stream = b": ping\n\n" + engine.frames(STOP_TEXT)
    body = {"messages": MESSAGES, "stop": ["you"]}
    assert through(mend_of(body | {"stream": True}), stream).startswith(b": ping\n\ndata: ")
    assert json.loads(through(mend_of(body), stream))["choices"]


def test_an_error_event_passes_in_a_stream_and_ends_a_whole_answer() -> None:
    stream = engine.frames([*STOP_TEXT[:2], {"error": {"code": 500, "message": "Compute error."}}], done=False)
    body = {"messages": MESSAGES, "stop": ["you"]}
    assert through(mend_of(body | {"stream": True}), stream).endswith(b'"message":"Compute error."}}\n\n')
    with pytest.raises(UpstreamError, match=r"smol: .*Compute error\."):
        through(mend_of(body), stream)


def test_an_error_event_that_is_the_callers_fault_refuses_a_whole_answer_as_a_status_would() -> None:
    error = {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8}
    with pytest.raises(ContextLengthExceeded):
        through(mend_of({"messages": MESSAGES}), engine.frames([engine.role(), {"error": error}], done=False))


def test_a_stream_that_broke_off_is_not_given_as_a_whole_answer_and_gets_no_end() -> None:
    stream = engine.frames(STOP_TEXT, done=False)
    body = {"messages": MESSAGES, "stop": ["you"]}
    with pytest.raises(UpstreamError, match="before its answer was whole"):
        through(mend_of(body), stream)
    assert b"[DONE]" not in through(mend_of(body | {"stream": True}), stream)


def test_documents_come_back_with_their_ranks() -> None:
    body = {"query": "q", "documents": ["a", {"text": "b", "id": 7}], "return_documents": True}
    mend = session("rerank").prepare(exchange(body, "/v1/rerank")).mend
    assert mend is not None
    results = [{"index": 1, "relevance_score": 0.5}, {"index": 0, "relevance_score": -0.25}]
    answer = json.loads(through(mend, json.dumps({"model": "m", "results": results}).encode(), [5, 9]))
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.5, "document": {"text": "b", "id": 7}},
        {"index": 0, "relevance_score": -0.25, "document": {"text": "a"}},
    ]
