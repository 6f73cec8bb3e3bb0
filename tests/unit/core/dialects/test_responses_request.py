"""A Responses request as the neuron's chat body."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from helexa.core.dialects.neuron_request import Options
from helexa.core.dialects.responses_input import seal
from helexa.core.dialects.responses_items import try_listed
from helexa.core.dialects.responses_request import Translation, read, translate
from helexa.core.errors import BadRequest
from helexa.neuron.harness.openai_fields import read_chat

SCHEMA = {"type": "object", "properties": {"x": {"type": "number"}}}
FUNCTION = {"type": "function", "name": "f", "parameters": SCHEMA}
CUSTOM = {"type": "custom", "name": "patch", "description": "Edits."}
SPACE = {"type": "namespace", "name": "home", "description": "Of the house.", "tools": [FUNCTION, CUSTOM]}


def translated(*, history: list[dict[str, Any]] | None = None, **fields: Any) -> Translation:
    body = json.dumps({"input": "Hi", **fields}).encode()
    before = read(json.dumps({"input": history or []}).encode()).input
    assert isinstance(before, list)
    return translate(read(body), body, history=before, context=fields.pop("context", None))


def chat(**fields: Any) -> dict[str, Any]:
    raw = translated(**fields).body("m")
    read_chat(raw, max_choices=4, context=32768)
    found: dict[str, Any] = json.loads(raw)
    return found


def messages(*items: Any, **fields: Any) -> Any:
    return chat(input=list(items), **fields)["messages"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(call_id: str = "c1", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}", **fields}


def refused(**fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        translated(**fields)
    assert caught.value.param is not None
    assert f"`{caught.value.param}`" in caught.value.message
    return caught.value.param


# the input


def test_a_text_is_a_message_of_the_user_s() -> None:
    assert chat()["messages"] == [user("Hi")]


def test_instructions_come_first_and_history_before_the_input() -> None:
    made = chat(instructions="Be brief.", history=[user("One"), {"role": "assistant", "content": "Two"}])
    assert [(m["role"], m["content"]) for m in made["messages"]] == [
        ("system", "Be brief."), ("user", "One"), ("assistant", "Two"), ("user", "Hi"),
    ]  # fmt: skip


def test_developer_is_told_as_system_and_messages_stay_as_many_as_they_are() -> None:
    items = [{"role": "developer", "content": "A"}, {"type": "message", "role": "system", "content": "B"}]
    made = messages(*items, user("C"), user("D"))
    assert [(m["role"], m["content"]) for m in made] == [
        ("system", "A"), ("system", "B"), ("user", "C"), ("user", "D"),
    ]  # fmt: skip


def test_parts_are_text_images_and_files_of_text() -> None:
    data = base64.b64encode("naïve".encode()).decode()
    (made,) = messages(
        user(
            [
                {"type": "input_text", "text": "See"},
                {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AA=="},
                {"type": "input_file", "filename": "a.txt", "file_data": f"data:text/plain;base64,{data}"},
                {"type": "input_file", "file_data": data},
            ]
        )
    )
    assert made["content"] == [
        {"type": "text", "text": "See"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "a.txt\nnaïve"},
        {"type": "text", "text": "naïve"},
    ]


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "input_image", "image_url": "file:///y.png"}, "image_url"),
        ({"type": "input_image", "file_id": "file_1"}, "image_url"),
        ({"type": "input_image", "image_url": {"url": "data:,"}}, "image_url"),
        ({"type": "input_file", "file_id": "file_1"}, "file_data"),
        ({"type": "input_file", "file_data": base64.b64encode(b"%PDF-1.7").decode()}, "file_data"),
        ({"type": "input_file", "file_data": base64.b64encode(b"\xff\x00").decode()}, "file_data"),
        ({"type": "input_file", "file_data": "not base64"}, "file_data"),
        ({"type": "input_audio"}, "type"),
        ({"type": "input_text"}, "text"),
        ({}, "type"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(part: dict[str, Any], param: str) -> None:
    assert (
        refused(input=[user("a"), user([{"type": "input_text", "text": "b"}, part])]) == f"input[1].content[1].{param}"
    )


def test_reasoning_text_and_calls_are_one_turn_of_the_assistant_s() -> None:
    made = messages(
        user("Go"),
        {"type": "reasoning", "id": "rs_hx1o0", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
        call("c1", arguments='{"x": 1}'),
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": 'a "b"'},
        {"type": "function_call_output", "call_id": "c1", "output": "ok"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
        {"role": "assistant", "content": "First."},
        {"role": "assistant", "content": "Second."},
    )
    assert made[1:] == [
        {
            "role": "assistant",
            "content": "Well",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "patch", "arguments": '{"input":"a \\"b\\""}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
        {"role": "assistant", "content": "First."},
        {"role": "assistant", "content": "Second."},
    ]


def test_calls_without_a_text_have_no_content() -> None:
    assert messages(user("Go"), call())[1]["content"] is None


def test_a_text_after_a_call_begins_another_turn() -> None:
    assert len(messages(user("Go"), call(), {"role": "assistant", "content": "Also"})) == 3


@pytest.mark.parametrize(
    ("item", "kept"),
    [
        ({"encrypted_content": seal("Hm.")}, "Hm."),
        ({"encrypted_content": seal("Hm."), "summary": [{"type": "summary_text", "text": "short"}]}, "Hm."),
        ({"content": [{"type": "reasoning_text", "text": "Hm."}]}, "Hm."),
        ({"id": "rs_hx1o0", "summary": [{"type": "summary_text", "text": "Hm."}]}, "Hm."),
        ({"encrypted_content": "gAAAAA", "content": [{"type": "reasoning_text", "text": "Hm."}]}, None),
        ({"encrypted_content": "hx1.!"}, None),
        ({"id": "rs_68ab", "summary": [{"type": "summary_text", "text": "Hm."}]}, None),
    ],
)
def test_only_reasoning_that_is_ours_reaches_the_template(item: dict[str, Any], kept: str | None) -> None:
    made = translated(input=[user("Go"), {"type": "reasoning", "summary": [], **item}, call()])
    turn = json.loads(made.body("m"))["messages"][1]
    assert turn.get("reasoning_content") == kept
    assert made.dropped == (() if kept else ("reasoning",))


def test_reasoning_that_says_nothing_is_not_worth_a_word() -> None:
    made = translated(input=[user("Go"), {"type": "reasoning", "id": "rs_68ab", "summary": []}])
    assert made.dropped == ()


def test_traces_of_hosted_tools_are_dropped_and_named() -> None:
    made = translated(
        input=[
            user("Go"),
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
            {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
            {"type": "tool_search_call", "arguments": {"q": 1}},
        ]
    )
    assert made.dropped == ("web_search_call", "computer_call_output", "tool_search_call")


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "dance"}, "type"),
        ({"role": "tool", "content": "x"}, "role"),
        ({"type": "message", "content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 7}, "content"),
        ({"role": "assistant", "content": [{"type": "input_image"}]}, "content[0].type"),
        ({"type": "item_reference", "id": "msg_1"}, "id"),
        ({}, "id"),
        (call(call_id=""), "call_id"),
        (call(name=None), "name"),
        (call(arguments={"x": 1}), "arguments"),
        ({"type": "custom_tool_call", "call_id": "c", "name": "n"}, "input"),
        ({"type": "function_call_output", "output": "x"}, "call_id"),
        ({"type": "function_call_output", "call_id": "c"}, "output"),
        ({"type": "function_call_output", "call_id": "c", "output": {"a": 1}}, "output"),
    ],
)
def test_an_item_that_is_not_understood_is_named(item: dict[str, Any], param: str) -> None:
    assert refused(input=[item]) == f"input[0].{param}"


@pytest.mark.parametrize("asked", [None, []])
def test_there_has_to_be_an_input_or_something_that_goes_on(asked: Any) -> None:
    assert refused(input=asked) == "input"
    assert chat(input=asked, history=[user("One")])["messages"] == [user("One")]


# tools


def test_functions_stay_what_they_are() -> None:
    made = chat(tools=[{**FUNCTION, "description": "Does.", "strict": True}, {"type": "function", "name": "g"}])
    assert [tool["function"] for tool in made["tools"]] == [
        {"name": "f", "description": "Does.", "parameters": SCHEMA, "strict": True},
        {"name": "g"},
    ]


def test_a_custom_tool_is_a_function_with_one_text_and_its_grammar_is_told() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    made = translated(tools=[CUSTOM, {**CUSTOM, "name": "sql", "format": grammar}])
    plain, told = (tool["function"] for tool in json.loads(made.body("m"))["tools"])
    assert plain == {
        "name": "patch",
        "description": "Edits.",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
            "additionalProperties": False,
        },
    }
    assert "start: /.+/" in told["parameters"]["properties"]["input"]["description"]
    assert made.dropped == ("tools.format",)
    assert made.called["patch"].is_custom


def test_a_namespace_is_flattened_and_its_description_not_lost() -> None:
    made = translated(tools=[SPACE, {**SPACE, "name": "mcp__x__"}])
    functions = [tool["function"] for tool in json.loads(made.body("m"))["tools"]]
    assert [function["name"] for function in functions] == ["home__f", "home__patch", "mcp__x__f", "mcp__x__patch"]
    assert functions[0]["description"] == "Of the house."
    assert functions[1]["description"] == "Edits."
    called = made.called["home__patch"]
    assert (called.name, called.namespace, called.is_custom) == ("patch", "home", True)
    back = messages(user("Go"), call(namespace="home"))
    assert back[1]["tool_calls"][0]["function"]["name"] == "home__f"


def test_hosted_tools_are_dropped_and_the_answer_does_not_repeat_them() -> None:
    tools = [{"type": "web_search"}, FUNCTION, {"type": "mcp", "server_label": "wiki"}, {"type": "apply_patch"}]
    made = translated(tools=tools)
    assert made.dropped == ("web_search", "wiki", "apply_patch")
    assert json.loads(b"{" + made.echo + b"}")["tools"] == [FUNCTION]
    body = json.dumps({"input": "Hi", "tools": tools}).encode()
    with pytest.raises(BadRequest, match=r"tools\[0\]"):
        translate(read(body), body, options=Options(refuse_hosted_tools=True))


def test_tools_among_the_items_are_tools() -> None:
    made = translated(input=[user("Go"), {"type": "additional_tools", "role": "developer", "tools": [FUNCTION]}])
    assert [tool["function"]["name"] for tool in json.loads(made.body("m"))["tools"]] == ["f"]
    assert json.loads(b"{" + made.echo + b"}")["tools"] == []


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "function"}], "tools[0].name"),
        ([{"name": "f"}], "tools[0].type"),
        ([FUNCTION, {**FUNCTION, "parameters": 7}], "tools[1].name"),
        ([{**FUNCTION, "parameters": 7}], "tools[0].parameters"),
        ([FUNCTION, FUNCTION], "tools[1].name"),
        ([{**SPACE, "name": ""}], "tools[0].name"),
        ([{**SPACE, "tools": [{"type": "mcp"}]}], "tools[0].tools[0].type"),
    ],
)
def test_a_tool_that_cannot_be_is_named(tools: list[Any], param: str) -> None:
    assert refused(tools=tools) == param


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "g"}, "g"),
        ({"type": "custom", "name": "patch"}, "home__patch"),  # there is but one of that name
        ({"type": "function", "name": "f", "namespace": "home"}, "home__f"),
    ],
)
def test_each_choice_is_passed_on(choice: Any, made: str) -> None:
    body = chat(tools=[{"type": "function", "name": "g"}, SPACE], tool_choice=choice)
    told = body["tool_choice"]
    assert (told if isinstance(told, str) else told["function"]["name"]) == made
    forced = made not in ("auto", "none")
    assert ("chat_template_kwargs" in body) is forced


def test_allowed_tools_are_all_that_the_model_is_given() -> None:
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "g"}, {"type": "mcp"}],
    }
    body = chat(tools=[FUNCTION, {"type": "function", "name": "g"}], tool_choice=choice)
    assert [tool["function"]["name"] for tool in body["tools"]] == ["g"]
    assert body["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        ({"type": "function", "name": "nobody"}, "tool_choice.name"),
        ({"type": "function"}, "tool_choice.name"),
        ({"type": "web_search_preview"}, "tool_choice.type"),
        ({}, "tool_choice.type"),
        ({"type": "allowed_tools", "tools": []}, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "required", "tools": []}, "tool_choice.mode"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            "tool_choice.tools[0].name",
        ),
    ],
)
def test_a_choice_that_cannot_be_is_named(choice: Any, param: str) -> None:
    assert refused(tools=[FUNCTION], tool_choice=choice) == param


def test_a_forced_call_needs_a_tool() -> None:
    assert refused(tool_choice="required") == "tool_choice"
    assert "tool_choice" not in chat(tool_choice="auto")


# all else


def test_sampling_is_passed_on() -> None:
    body = chat(temperature=0.5, top_p=0.9, max_output_tokens=99, top_logprobs=3, user="u", prompt_cache_key="k")
    for name, value in {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 99, "logprobs": True, "top_logprobs": 3, "user": "u",
        "prompt_cache_key": "k", "stream": True, "stream_options": {"include_usage": True}, "return_progress": True,
    }.items():  # fmt: skip
        assert body[name] == value
    assert "max_tokens" not in chat()


def test_more_tokens_than_the_context_has_are_cut_down() -> None:
    body = b'{"input":"Hi","max_output_tokens":32000}'
    assert json.loads(translate(read(body), body, context=1024).body("m"))["max_tokens"] == 1024


def test_log_probabilities_are_asked_for_in_either_way() -> None:
    assert chat(include=["message.output_text.logprobs"])["logprobs"] is True
    assert "logprobs" not in chat(top_logprobs=0)


@pytest.mark.parametrize(
    ("reasoning", "switch", "effort"),
    [
        (None, None, None),
        ({}, None, None),
        ({"summary": "auto"}, None, None),
        ({"effort": "none"}, False, None),
        ({"effort": "minimal"}, False, None),
        ({"effort": "low"}, True, "low"),
        ({"effort": "xhigh", "summary": "detailed"}, True, "high"),
    ],
)
def test_each_effort_is_the_template_s(reasoning: Any, switch: bool | None, effort: str | None) -> None:
    body = chat(reasoning=reasoning)
    assert body.get("chat_template_kwargs") == ({"enable_thinking": switch} if switch is not None else None)
    assert body.get("reasoning_effort") == effort


def test_a_summary_is_shown_where_it_was_asked_for() -> None:
    assert translated(reasoning={"summary": "auto"}).show_summary
    assert translated(reasoning={"generate_summary": "concise"}).show_summary
    assert not translated(reasoning={"effort": "high"}).show_summary
    assert translated(include=["reasoning.encrypted_content"]).seal


def test_a_schema_is_the_response_s_format() -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"}
    assert chat(text={"format": form})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
    }
    assert chat(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in chat(text={"format": {"type": "text"}, "verbosity": "medium"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "some"}}, "reasoning.summary"),
        ({"text": {"verbosity": "some"}}, "text.verbosity"),
        ({"text": {"format": {"type": "some"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"tools": {}}, "tools"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields) == param


def test_what_is_known_and_not_done_is_named_and_what_is_ordinary_is_not() -> None:
    made = translated(
        truncation="auto",
        service_tier="flex",
        max_tool_calls=3,
        client_metadata={"a": "b"},
        include=["web_search_call.results", "reasoning.encrypted_content"],
        stream_options={"include_obfuscation": True},
        text={"verbosity": "low"},
        tools=[{**FUNCTION, "defer_loading": True, "allowed_callers": ["programmatic"]}],
    )
    assert set(made.dropped) == {
        "truncation", "service_tier", "max_tool_calls", "client_metadata", "include.web_search_call.results",
        "stream_options", "text.verbosity", "tools.defer_loading", "tools.allowed_callers",
    }  # fmt: skip
    ordinary = translated(
        truncation="disabled", service_tier="auto", background=False, stream_options={"include_usage": True}, store=True
    )
    assert ordinary.dropped == ()
    assert ordinary.dropped_header == b""
    assert translated(truncation="auto").dropped_header == b"x-helexa-dropped: truncation\r\n"


def test_what_a_node_names_is_named_as_the_client_does() -> None:
    made = translated(
        instructions="I",
        input=[user("a"), {"type": "reasoning", "summary": []}, user([{"type": "input_text", "text": "b"}])],
        tools=[{"type": "web_search"}, FUNCTION, SPACE],
    )
    names = {
        "messages": "input",
        "messages[0].content": "instructions.content",
        "messages[2].content[0].text": "input[2].content[0].text",
        "messages[9]": "messages[9]",
        "tools[0].function.parameters.type": "tools[1].parameters.type",
        "tools[2].function.name": "tools[2].tools[1].name",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "temperature": "temperature",
    }
    assert {param: made.places.name(param) for param in names} == names


def test_the_answer_repeats_the_request_on_one_line() -> None:
    asked = {
        "input": "Hi",
        "tools": [FUNCTION],
        "text": {"format": {"type": "text"}},
        "tool_choice": None,
        "reasoning": {},
    }
    body = json.dumps(asked, indent=2).encode()
    echo = translate(read(body), body).echo
    assert b"\n" not in echo
    told = json.loads(b"{" + echo + b"}")
    assert (told["tools"], told["tool_choice"], told["text"]) == ([FUNCTION], "auto", {"format": {"type": "text"}})


@pytest.mark.parametrize("skipped", [b"1e999", b"[" * 950 + b"]" * 950 + b"1"])
def test_an_input_with_what_reading_skips_and_nobody_can_list_is_listed_as_nothing(skipped: bytes) -> None:
    assert try_listed(b'{"input":[{"role":"user","content":"x","foo":' + skipped + b"}]}", "k") is None


def test_a_body_that_is_no_utf_8_is_refused_though_the_fault_is_where_nobody_looks() -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        read(b'{"input":[{"role":"user","content":"x","foo":"\xff"}]}')


def test_a_tool_s_own_name_means_one_in_a_namespace_only_where_it_is_the_only_one() -> None:
    other = {**SPACE, "name": "yard"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    assert [t["function"]["name"] for t in chat(tools=[SPACE], tool_choice=choice)["tools"]] == ["home__f"]
    assert refused(tools=[SPACE, other], tool_choice=choice) == "tool_choice.tools[0].name"
