"""Calls that the model wrote as JSON, read back as tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import engine_events as engine

from helexa.neuron.harness.collect import Collector
from helexa.neuron.harness.llama.mends import AnswerMend
from helexa.neuron.harness.llama.mends_tools import WrittenCalls, call_schema

NAMES = ("add", "add_all", "get.weather")


def answer(pieces: Sequence[str], *, must: bool, finish: str = "stop") -> dict[str, Any]:
    mend = AnswerMend([WrittenCalls(NAMES, must=must)], Collector())
    events = [engine.role(), *engine.text(*pieces), engine.delta(finish=finish), engine.usage(1)]
    mend.feed(engine.frames(events))
    choice: dict[str, Any] = json.loads(mend.finish())["choices"][0]
    return choice


def cut(text: str, at: Sequence[int]) -> list[str]:
    points = [0, *sorted(at), len(text)]
    return [text[a:b] for a, b in pairwise(points) if a < b]


WORDS = st.text('"\\{}[] aé\n', max_size=4)
ARGUMENTS = st.dictionaries(WORDS, WORDS | st.integers() | st.lists(WORDS, max_size=2) | st.dictionaries(WORDS, WORDS))


@settings(deadline=None)
@given(st.sampled_from(NAMES), ARGUMENTS, st.sampled_from([None, 2]), st.lists(st.integers(0, 60)), st.booleans())
def test_a_call_is_read_back_however_it_was_written(
    name: str, arguments: dict[str, Any], indent: int | None, at: list[int], must: bool
) -> None:
    written = json.dumps({"name": name, "arguments": arguments}, indent=indent)
    choice = answer(cut(written, [i for i in at if i < len(written)]), must=must)
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == arguments
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


NO_CALLS = ['{"name": "other", "arguments": {}}', '{"name"', " {", '{"name": "add"}', '{"name": "add", "arguments": 1}']


@settings(deadline=None)
@given(st.text(max_size=40) | st.sampled_from(NO_CALLS))
def test_text_that_is_no_call_passes_unchanged(text: str) -> None:
    choice = answer(list(text), must=False)
    assert choice["message"].get("tool_calls") is None
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"


def test_text_streams_as_soon_as_it_can_be_no_call() -> None:
    mend = AnswerMend([WrittenCalls(NAMES, must=False)])
    assert b"tool_calls" not in mend.feed(engine.frames(engine.text("Hi"), done=False))
    held = mend.feed(engine.frames(engine.text("x"), done=False))
    assert b'"content":"x"' in held


def test_text_that_might_have_become_a_call_comes_out_before_its_end() -> None:
    mend = AnswerMend([WrittenCalls(NAMES, must=False)])
    assert mend.feed(engine.frames(engine.text('{"na'), done=False)) == b""
    out = mend.feed(engine.frames([engine.delta(finish="length")]))
    assert out.index(b'{\\"na') < out.index(b'"length"')


def test_a_call_that_was_cut_short_says_so() -> None:
    choice = answer(['{"name": "add", "arguments": {"a": 1'], must=True, finish="length")
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1'


def test_a_forced_call_cut_before_its_name_shows_nothing() -> None:
    choice = answer(['{"name": "ad'], must=True, finish="length")
    assert choice["message"] == {"role": "assistant", "content": "", "refusal": None}


def test_what_follows_the_arguments_is_no_part_of_them() -> None:
    choice = answer(['{"name": "add", "arguments": {"a": "}"}', "}", "\n", "{"], must=False)
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "}"}


def test_calls_in_a_fence_are_read_and_there_may_be_several() -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    choice = answer(cut(f"Sure.\n```json\n[{call}, {call}]\n```", [3, 9, 30]), must=False)
    assert choice["message"]["content"] == "Sure."
    assert [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [{"a": 1}, {"a": 1}]
    assert len({c["id"] for c in choice["message"]["tool_calls"]}) == 2


def test_reasoning_before_a_call_passes() -> None:
    mend = AnswerMend([WrittenCalls(NAMES, must=True)], Collector())
    call = engine.text('{"name":"add","arguments":{}}')
    events = [engine.delta(reasoning_content="hm"), *call, engine.delta(finish="stop")]
    mend.feed(engine.frames(events))
    message = json.loads(mend.finish())["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}


def test_choices_are_read_apart_and_their_calls_have_names_of_their_own() -> None:
    mend = AnswerMend([WrittenCalls(NAMES, must=True)], Collector())
    parts = ['{"name":', '"add","arguments":{', "}}"]
    mend.feed(engine.frames([e for part in parts for i in (1, 0) for e in engine.text(part, index=i)]))
    calls = [c["message"]["tool_calls"][0] for c in json.loads(mend.finish())["choices"]]
    assert [c["function"]["arguments"] for c in calls] == ["{}", "{}"]
    assert calls[0]["id"] != calls[1]["id"]


def test_the_engines_own_tool_calls_pass() -> None:
    own = {"index": 0, "id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    mend = AnswerMend([WrittenCalls(NAMES, must=True)], Collector())
    mend.feed(engine.frames([engine.delta(tool_calls=[own]), engine.delta(finish="tool_calls")]))
    choice = json.loads(mend.finish())["choices"][0]
    assert choice["message"]["tool_calls"] == [{k: v for k, v in own.items() if k != "index"}]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_function_without_parameters_is_called_with_an_empty_object(parameters: Any) -> None:
    schema = call_schema([("now", parameters)])
    assert schema["$defs"]["f0"] == {"type": "object", "properties": {}, "additionalProperties": False}


def test_references_inside_parameters_move_with_them() -> None:
    parameters = {
        "$defs": {"P": {"type": "object", "properties": {"next": {"$ref": "#/$defs/P"}, "all": {"$ref": "#"}}}},
        "type": "object",
        "properties": {"p": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]}},
    }
    moved = call_schema([("a", None), ("b", parameters)])["$defs"]["f1"]
    assert moved["properties"]["p"]["anyOf"][0] == {"$ref": "#/$defs/f1/$defs/P"}
    assert moved["$defs"]["P"]["properties"] == {"next": {"$ref": "#/$defs/f1/$defs/P"}, "all": {"$ref": "#/$defs/f1"}}
