"""Tool calls and thoughts as a torch model's host tells them, over an engine that plays the model's text."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from tests.helpers.conversations import SPECIAL, TOOL, source
from tests.helpers.torch_serving import PlayedEngine, events_of, host
from tests.integration.neuron.test_torch_server import ask, error_of

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[torch]'")
from helexa.neuron.harness.collect import Collector
from helexa.neuron.harness.templates.template import ChatTemplate

USER = [{"role": "user", "content": "Weather?"}]
BODY: dict[str, Any] = {"messages": USER, "tools": [TOOL]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TEXT = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}"


def told(name: str) -> dict[str, Any]:
    return {"template": lambda: ChatTemplate(source(name), SPECIAL, model="tiny"), "context": 4096}


def answered(text: str, body: dict[str, Any], name: str = "hermes-thinking") -> dict[str, Any]:
    """The choice of a whole answer, which is the same as the collected stream's."""
    with host(PlayedEngine(list(text)), **told(name)) as it:
        choice: dict[str, Any] = ask(it, body).json(dict[str, Any])["choices"][0]
        collector = Collector()
        for chunk in events_of(ask(it, body | {"stream": True})):
            collector.add(chunk)
    streamed = collector.answer()["choices"][0]
    for one in (choice, streamed):
        for call in one["message"].get("tool_calls") or ():
            assert call.pop("id").startswith("call_")
    assert streamed == choice
    return choice


def test_thoughts_text_and_a_call_are_told_apart() -> None:
    choice = answered(TEXT, BODY)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Let me see.")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city":"Zürich"}'}


def test_without_tools_a_call_is_text_and_so_is_one_that_is_malformed() -> None:
    assert answered(TEXT, {"messages": USER})["message"]["content"] == TEXT.partition("</think>\n\n")[2]
    for text in (TEXT.replace("get_weather", "nobody"), TEXT.replace('"}}', '"}')):
        choice = answered(text, BODY)
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text.partition("</think>\n\n")[2]
        assert not choice["message"].get("tool_calls")


def test_a_forced_call_is_held_by_a_grammar_and_thoughts_are_off() -> None:
    forced = BODY | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    engine = PlayedEngine(['<tool_call>\n{"name": "get_weather", "arguments": {"ci', 'ty": "Z"}}\n</tool_call>'])
    with host(engine, **told("hermes-thinking")) as it:
        chunks = events_of(ask(it, forced | {"stream": True}))
    request = engine.asked[0].request
    assert request.grammar is not None
    assert (request.grammar.kind, request.grammar.param) == ("lark", "tools")
    assert request.special_text
    assert "".join(map(chr, request.prompt)).endswith("<think>\n\n</think>\n\n")
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    arguments = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if "tool_calls" in d]
    assert arguments == ["", '{"ci', 'ty": "Z"}']
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_choice_of_none_shows_the_tools_as_llama_does_and_reads_no_calls() -> None:
    engine = PlayedEngine(list(TEXT))
    with host(engine, **told("hermes-thinking")) as it:
        choice = ask(it, BODY | {"tool_choice": "none"}).json(dict[str, Any])["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert "get_weather" in "".join(map(chr, engine.asked[0].request.prompt))  # so that the cache holds
    assert engine.asked[0].request.grammar is None


def test_a_call_that_was_cut_off_ends_with_length() -> None:
    engine = PlayedEngine()
    with host(engine, **told("hermes-thinking")) as it:

        def play() -> None:
            (asked,) = engine.wait_for()
            asked.say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Z', reason="length")

        thread = threading.Thread(target=play)
        thread.start()
        choice = ask(it, BODY | {"tool_choice": "required", "max_tokens": 9}).json(dict[str, Any])["choices"][0]
        thread.join()
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Z'


@pytest.mark.parametrize("name", ["hermes-thinking", "xml-parameters", "llama3", "mistral", "harmony"])
def test_calls_and_results_reach_each_template_as_it_knows_them(name: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Z"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    engine = PlayedEngine(["wet"])
    with host(engine, **told(name)) as it:
        assert ask(it, {"messages": messages, "tools": [TOOL]}).status == 200
        counted = ask(it, {"messages": messages, "tools": [TOOL]}, "/v1/tokens/count").json(dict[str, Any])
    assert counted["input_tokens"] > 50


def test_a_template_that_refuses_while_tools_are_given_is_a_422() -> None:
    with host(PlayedEngine(["x"]), **told("mistral")) as it:
        answer = ask(it, {"messages": [*USER, *USER], "tools": [TOOL]})
        assert (answer.status, error_of(answer)["code"]) == (422, "template_failed")
        assert ask(it, {"messages": [*USER, *USER]}).status == 400


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"reasoning_effort": "none"}, True),
        ({"tools": [TOOL], "tool_choice": "required", "chat_template_kwargs": {"enable_thinking": True}}, False),
        ({}, False),
    ],
)
def test_thoughts_are_switched_by_what_the_request_says(body: dict[str, Any], shown: bool) -> None:
    engine = PlayedEngine(["x"])
    with host(engine, **told("hermes-thinking")) as it:
        ask(it, {"messages": USER, **body})
    assert "".join(map(chr, engine.asked[0].request.prompt)).endswith("</think>\n\n") is shown


def test_a_grammar_of_the_caller_excludes_tools() -> None:
    with host(PlayedEngine(["x"]), **told("hermes-thinking")) as it:
        assert error_of(ask(it, BODY | {"grammar": 'root ::= "x"'}))["param"] == "grammar"


def test_ids_and_arguments_are_those_of_json() -> None:
    message = answered(TEXT, BODY)["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich"}
