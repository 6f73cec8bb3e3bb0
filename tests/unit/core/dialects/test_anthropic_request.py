"""A Messages request as the chat body that the neuron gets: every field, each block, every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helexa.core.dialects import anthropic_wire as wire
from helexa.core.dialects.anthropic_request import Translation, translate
from helexa.core.dialects.neuron_request import Options
from helexa.core.errors import BadRequest, Dialect, render

PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}


def asked(*messages: dict[str, Any], **fields: Any) -> Translation:
    body = {"model": "m", "max_tokens": 10, "messages": list(messages) or [user("Hi")], **fields}
    return translate(json.dumps(body).encode())


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked(*messages, **fields).body("node's name"))
    return found


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def result(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", **({"content": content} if content is not None else {}), **more}


def call(number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"t{number}", "name": "add", "input": arguments}


def refusal(*messages: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        asked(*messages, **fields)
    envelope = json.loads(render(caught.value, Dialect.ANTHROPIC, "r"))
    assert envelope["error"]["type"] == "invalid_request_error"
    message: str = envelope["error"]["message"]
    return message


# the body


def test_the_neuron_is_asked_for_a_stream_with_usage_and_progress_under_its_own_name() -> None:
    body = chat(stream=False)
    assert body["model"] == "node's name"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["return_progress"] is True


def test_sampling_is_passed_on() -> None:
    body = chat(temperature=0.3, top_p=0.9, top_k=40, stop_sequences=["a", "b"], metadata={"user_id": "u"})
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.3, 0.9, 40)
    assert (body["stop"], body["user"]) == (["a", "b"], "u")


def test_max_tokens_never_go_beyond_the_context_where_it_is_known() -> None:
    body = json.dumps({"model": "m", "max_tokens": 32_000, "messages": [user("Hi")]}).encode()
    assert json.loads(translate(body, context=4096).body("m"))["max_tokens"] == 4096
    assert json.loads(translate(body).body("m"))["max_tokens"] == 32_000
    assert translate(body, context=4096).max_tokens == 32_000


def test_counting_needs_no_max_tokens_and_renders_the_same_prompt() -> None:
    body = {"model": "m", "messages": [user("Hi")], "system": "S", "tools": [TOOL]}
    counted = json.loads(translate(json.dumps(body).encode(), counting=True).body("m"))
    sent = json.loads(translate(json.dumps({**body, "max_tokens": 5}).encode()).body("m"))
    assert sent.pop("max_tokens") == 5
    assert counted == sent


# system


def test_system_is_a_string_or_blocks() -> None:
    assert chat(system="S")["messages"][0] == {"role": "system", "content": "S"}
    assert chat(system=[text("S", cache_control={"type": "ephemeral"})])["messages"][0]["content"] == "S"
    assert chat(system=[text("A"), text("B")])["messages"][0]["content"] == [text("A"), text("B")]
    assert chat(system="")["messages"][0]["role"] == "user"


def test_a_system_message_among_the_others_stays_where_it_is() -> None:
    messages = chat(user("1"), {"role": "system", "content": [text("mid")]}, user("2"), system="S")["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "system", "user"]
    assert messages[2]["content"] == "mid"


def test_a_block_that_changes_with_every_request_is_left_out_unless_it_is_to_stay() -> None:
    fields = {"system": [text("x-anthropic-billing-header: cch=1;"), text("S")]}
    translation = asked(**fields)
    assert json.loads(translation.body("m"))["messages"][0]["content"] == "S"
    assert translation.dropped == ("x-anthropic-billing-header",)
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [user("Hi")], **fields}).encode()
    kept = translate(body, options=Options(keep_changing_blocks=True))
    assert len(json.loads(kept.body("m"))["messages"][0]["content"]) == 2


# turns


def test_consecutive_turns_of_one_role_are_one_turn() -> None:
    messages = chat(user("a"), user(text("b")), assistant(text("c")), assistant(text("d")))["messages"]
    assert messages == [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "cd"},
    ]


def test_an_image_is_a_part_with_a_data_address() -> None:
    (message,) = chat(user(text("What?"), {"type": "image", "source": PNG}))["messages"]
    assert message["content"][1] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    (alone,) = chat(user({"type": "image", "source": PNG}))["messages"]
    assert [part["type"] for part in alone["content"]] == ["image_url"]


def test_a_document_is_its_title_its_context_and_its_text() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "D"}
    document = {"type": "document", "source": source, "title": "T", "context": "C", "citations": {"enabled": True}}
    translation = asked(user(document))
    assert json.loads(translation.body("m"))["messages"][0]["content"] == [text("T\nC"), text("D")]
    assert translation.dropped == ("citations",)
    of_blocks = {"type": "document", "source": {"type": "content", "content": [text("x"), text("y")]}}
    assert chat(user(of_blocks))["messages"][0]["content"] == [text("x"), text("y")]


def test_a_search_result_is_text() -> None:
    block = {"type": "search_result", "title": "T", "source": "https://x", "content": [text("a")]}
    assert chat(user(block))["messages"][0]["content"] == "T\nhttps://x\na"


# calls and results


def test_calls_and_results_go_there_and_their_order_stays() -> None:
    messages = chat(user("?"), assistant(text("I add."), call(1, a=1)), user(result("3"), text("And?")), tools=[TOOL])[
        "messages"
    ]
    assert messages[1] == {
        "role": "assistant",
        "content": "I add.",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "user", "content": "And?"},
    ]


def test_a_turn_of_calls_alone_has_no_content() -> None:
    assert chat(user("?"), assistant(call()))["messages"][1]["content"] is None


def test_a_call_s_numbers_stay_as_the_client_wrote_them() -> None:
    block = '{"type":"tool_use","id":"t","name":"f","input":{"x":0.7,"y":1.10,"z":123456789012345678901}}'
    body = f'{{"model":"m","max_tokens":1,"messages":[{{"role":"assistant","content":[{block}]}}]}}'
    made = json.loads(translate(body.encode()).body("m"))
    arguments = made["messages"][0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"x":0.7,"y":1.10,"z":123456789012345678901}'


@pytest.mark.parametrize(
    ("block", "content"),
    [
        (result("3"), "3"),
        (result(), ""),
        (result([]), ""),
        (result([text("a")]), "a"),
        (result([text("a"), text("b")]), [text("a"), text("b")]),
        (result("no such file", is_error=True), "Error: no such file"),
        (result("Error: no such file", is_error=True), "Error: no such file"),
        (result("<tool_use_error>no</tool_use_error>", is_error=True), "<tool_use_error>no</tool_use_error>"),
        (result(is_error=True), "Error"),
        (result([text("no")], is_error=True), "Error: no"),
        (result("errors: 0", is_error=False), "errors: 0"),
    ],
)
def test_a_result_is_text_or_parts_and_says_when_it_is_an_error(block: dict[str, Any], content: Any) -> None:
    assert chat(user(block))["messages"] == [{"role": "tool", "tool_call_id": "t1", "content": content}]


def test_an_image_in_a_result_stays_in_it() -> None:
    (message,) = chat(user(result([text("see"), {"type": "image", "source": PNG}])))["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "image_url"]


# thinking


def test_our_own_thinking_goes_back_to_the_template_and_anothers_does_not() -> None:
    ours = {"type": "thinking", "thinking": "hm", "signature": "hx1.msg_1"}
    unsigned = {"type": "thinking", "thinking": "so", "signature": ""}
    foreign = {"type": "thinking", "thinking": "claude's", "signature": "EqQBCkgIARAB"}
    redacted = {"type": "redacted_thinking", "data": "xyz"}
    translation = asked(user("?"), assistant(ours, unsigned, foreign, redacted, text("a")))
    assert json.loads(translation.body("m"))["messages"][1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hmso",
    }
    assert translation.dropped == ("thinking", "redacted_thinking")


@pytest.mark.parametrize(
    ("thinking", "switch", "budget"),
    [
        (None, False, None),
        ({"type": "disabled"}, False, None),
        ({"type": "between_tools"}, False, None),
        ({"type": "adaptive"}, True, None),
        ({"type": "adaptive", "display": "omitted"}, True, None),
        ({"type": "enabled", "budget_tokens": 2048}, True, 2048),
    ],
)
def test_thinking_is_the_template_s_switch_and_the_engine_s_budget(
    thinking: dict[str, Any] | None, switch: bool, budget: int | None
) -> None:
    body = chat(**({"thinking": thinking} if thinking else {}))
    assert body["chat_template_kwargs"] == {"enable_thinking": switch}
    assert body.get("thinking_budget_tokens") == budget


def test_a_forced_call_leaves_no_room_to_think_in() -> None:
    body = chat(tools=[TOOL], tool_choice={"type": "any"}, thinking={"type": "enabled", "budget_tokens": 2048})
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "thinking_budget_tokens" not in body


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (None, [None, None, "3"]),
        ("all", ["1", "2", "3"]),
        ({"type": "all"}, ["1", "2", "3"]),
        ({"type": "thinking_turns", "value": 2}, [None, "2", "3"]),
        ({"type": "thinking_turns", "value": 9}, ["1", "2", "3"]),
    ],
)
def test_context_management_clears_the_thinking_of_older_turns(keep: Any, kept: list[str | None]) -> None:
    edit = {"type": "clear_thinking_20251015", **({"keep": keep} if keep is not None else {})}
    conversation = []
    for number in "123":
        conversation.append(user("?"))
        conversation.append(assistant({"type": "thinking", "thinking": number, "signature": ""}, call()))
        conversation.append(user(result("r")))
        conversation.append(assistant(text("done")))
    translation = asked(
        *conversation, user("?"), context_management={"edits": [edit, {"type": "clear_tool_uses_20250919"}]}
    )
    told = json.loads(translation.body("m"))["messages"]
    assert [m.get("reasoning_content") for m in told if m.get("tool_calls")] == kept
    assert translation.dropped == ("context_management.clear_tool_uses_20250919",)


# tools


def test_tools_are_functions_and_their_schemas_stay_as_they_are() -> None:
    strict = {**TOOL, "name": "b", "strict": True, "type": "custom", "eager_input_streaming": True}
    assert chat(tools=[TOOL, strict])["tools"] == [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
        {
            "type": "function",
            "function": {"name": "b", "description": "Adds.", "parameters": {"type": "object"}, "strict": True},
        },
    ]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)
def test_every_tool_choice(choice: dict[str, Any], told: Any) -> None:
    assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == told


def test_parallel_calls_can_be_switched_off() -> None:
    body = chat(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert body["parallel_tool_calls"] is False
    assert "parallel_tool_calls" not in chat(tools=[TOOL], tool_choice={"type": "auto"})


def test_hosted_tools_are_left_out_and_named_or_refused() -> None:
    fields: dict[str, Any] = {
        "tools": [{"type": "web_search_20250305", "name": "web_search"}, TOOL, {"type": "mcp_toolset"}]
    }
    translation = asked(**fields)
    assert [t["function"]["name"] for t in json.loads(translation.body("m"))["tools"]] == ["add"]
    assert translation.dropped_header == b"x-helexa-dropped: web_search, mcp_toolset\r\n"
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [user("Hi")], **fields}).encode()
    with pytest.raises(BadRequest, match=r"tools\.0: web_search_20250305"):
        translate(body, options=Options(refuse_hosted_tools=True))
    assert "tools" not in chat(tools=[{"type": "bash_20250124", "name": "bash"}], tool_choice={"type": "auto"})


def test_output_config_is_a_schema_and_an_effort() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = chat(output_config={"effort": "xhigh", "format": {"type": "json_schema", "schema": schema}})
    assert body["reasoning_effort"] == "high"
    assert body["response_format"]["json_schema"]["schema"] == schema
    older = chat(output_format={"type": "json_schema", "schema": schema})
    assert older["response_format"] == body["response_format"]


# what is not supported


def test_what_is_known_and_not_supported_is_dropped_by_name() -> None:
    fields = {"service_tier": "priority", "container": "c", "mcp_servers": [{"name": "x"}], "speed": "fast"}
    assert set(asked(**fields).dropped) == set(fields)
    assert asked(service_tier="auto", mcp_servers=[], speed="standard", container=None).dropped == ()
    assert asked(tools=[{**TOOL, "input_examples": [{}], "defer_loading": True}]).dropped == (
        "tools.input_examples",
        "tools.defer_loading",
    )


@pytest.mark.parametrize(
    ("display", "shown", "dropped"),
    [
        ("summarized", True, ()),
        ("updates", True, ()),
        ("omitted", False, ()),
        ("next-years", True, ("thinking.display",)),
    ],
)
def test_thinking_is_shown_unless_it_is_to_be_omitted(display: str, shown: bool, dropped: tuple[str, ...]) -> None:
    translation = asked(thinking={"type": "adaptive", "display": display})
    assert translation.show_thinking is shown
    assert translation.dropped == dropped


@pytest.mark.parametrize("kind", sorted(wire.DROPPED_BLOCKS))
def test_traces_of_hosted_tools_are_dropped_by_name(kind: str) -> None:
    block = {"type": kind, "id": "s1", "name": "web_search", "input": {}, "content": []}
    translation = asked(user("?"), assistant(text("a"), block, text("b")))
    assert json.loads(translation.body("m"))["messages"][1]["content"] == "ab"
    assert translation.dropped == (kind,)


def test_a_header_can_carry_any_name_that_a_client_thinks_of() -> None:
    tools = [{"type": "x\r\nset-cookie: a", "name": None}, {"type": "ü" * 300}]
    header = asked(tools=tools).dropped_header
    assert header.count(b"\r\n") == 1
    assert header.isascii()


def test_unknown_fields_are_ignored_everywhere() -> None:
    body = chat(
        user(text("Hi", new="x")), new_thing={"a": 1}, tools=[{**TOOL, "new": 1}], thinking={"type": "adaptive", "x": 1}
    )
    assert "new_thing" not in body
    assert body["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [user("x"), {"role": "robot", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [user(text("a"), {"text": "b"})]}, "messages.0.content.1.type"),
        ({"messages": [user({"type": "text", "text": 7})]}, "messages.0.content.0.text"),
        ({"messages": [user({"type": "text"})]}, "messages.0.content.0.text"),
        ({"messages": [user({"type": "hologram"})]}, "messages.0.content.0.type"),
        ({"messages": [user(call())]}, "messages.0.content.0.type"),
        ({"messages": [assistant(result("x"))]}, "messages.0.content.0.type"),
        ({"messages": [user({"type": "tool_result"})]}, "messages.0.content.0.tool_use_id"),
        ({"messages": [user(result(7))]}, "messages.0.content.0.content"),
        ({"messages": [user(result({"type": "error"}))]}, "messages.0.content.0.content"),
        ({"messages": [user(result([{"type": "text"}]))]}, "messages.0.content.0.content.0.text"),
        ({"messages": [assistant({**call(), "input": "x"})]}, "messages.0.content.0.input"),
        ({"messages": [assistant({**call(), "id": ""})]}, "messages.0.content.0.id"),
        ({"messages": [assistant({"type": "tool_use", "id": "t"})]}, "messages.0.content.0.name"),
        ({"messages": [assistant({"type": "thinking"})]}, "messages.0.content.0.thinking"),
        ({"messages": [user({"type": "image"})]}, "messages.0.content.0.source"),
        ({"messages": [user({"type": "image", "source": {"type": "base64", "data": "x"}})]},
         "messages.0.content.0.source.media_type"),
        ({"messages": [user({"type": "image", "source": {"type": "url", "url": "file:///y.png"}})]},
         "messages.0.content.0.source.url"),
        ({"messages": [user({"type": "image", "source": {"type": "file", "file_id": "f"}})]},
         "messages.0.content.0.source.type"),
        ({"messages": [user({"type": "document", "source": {"type": "base64", "data": "x"}})]},
         "messages.0.content.0.source.type"),
        ({"messages": [{"role": "system", "content": [{"type": "image", "source": PNG}]}]},
         "messages.0.content.0.type"),
        ({"system": [{"type": "image", "source": PNG}]}, "system.0.type"),
        ({"system": 7}, "system"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences.1"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "some"}]}},
         "context_management.edits.0.keep"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"thread": {"type": "create"}}, "thread"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_and_names_the_field(fields: dict[str, Any], field: str) -> None:
    assert refusal(**fields).startswith(f"{field}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model":"\xff"}', b'{"a":' + b"[" * 5000])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        translate(body)


def test_the_three_lists_do_not_overlap_and_every_field_stands_on_one() -> None:
    lists = [wire.HONOURED, frozenset(wire.DROPPED), frozenset(wire.REFUSED)]
    assert len(frozenset().union(*lists)) == sum(map(len, lists))
    fields = set(wire.Request.__struct_fields__)
    assert fields | {"cache_control"} == frozenset().union(*lists)
    assert not wire.BLOCKS & wire.DROPPED_BLOCKS


def test_an_image_elsewhere_is_a_node_s_to_fetch_or_refuse() -> None:
    block = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    (part,) = chat(user(block))["messages"][0]["content"]
    assert part == {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
