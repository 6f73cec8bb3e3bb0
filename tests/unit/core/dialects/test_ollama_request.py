"""Ollama's requests as the neuron's: what each field becomes, and which one is named when it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helexa.core.dialects import ollama_wire as wire
from helexa.core.dialects.ollama_request import (
    CHAT,
    COMPLETIONS,
    Translation,
    chat,
    embed,
    embeddings,
    generate,
    naming,
)
from helexa.core.errors import BadRequest
from helexa.neuron.harness.openai_fields import read_chat, read_completion

USER = {"role": "user", "content": "Hi"}
PNG = "iVBORw0KGgo="
CALL = {"function": {"name": "f", "arguments": {"a": 1.50}}}


def asked(body: dict[str, Any], read: Any = chat) -> Translation:
    default = {"messages": [USER]} if read is chat else {"prompt": "Hi"} if read is generate else {}
    found: Translation = read(json.dumps({"model": "m", **default, **body}).encode())
    return found


def made(body: dict[str, Any], read: Any = chat) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked(body, read).body("m"))
    return found


def test_a_chat_is_a_streamed_chat_that_tells_its_usage() -> None:
    assert made({}) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert asked({}).path == CHAT


@pytest.mark.parametrize("option", [*wire.SAMPLING, *wire.SAMPLING_WHOLE])
def test_a_sampling_option_has_the_same_name_at_the_node(option: str) -> None:
    assert made({"options": {option: 1}})[option] == 1


def test_whole_numbers_may_be_written_as_floats_and_reach_the_node_as_whole() -> None:
    body = asked({"options": {"top_k": 40.0, "seed": 7.0, "num_predict": 5.0}}).body("m")
    assert b'"top_k":40,' in body
    assert made({"options": {"num_predict": 5.0}})["max_tokens"] == 5


@pytest.mark.parametrize("limit", [0, -1, -2])
def test_no_limit_is_no_limit(limit: int) -> None:
    assert "max_tokens" not in made({"options": {"num_predict": limit}})


@pytest.mark.parametrize(("stop", "stops"), [("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_stops_may_be_one_or_several(stop: Any, stops: list[str]) -> None:
    assert made({"options": {"stop": stop}})["stop"] == stops


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_format_that_is_none_binds_nothing(nothing: Any) -> None:
    assert "response_format" not in made({"format": nothing})


def test_formats_are_any_object_or_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    assert made({"format": "json"})["response_format"] == {"type": "json_object"}
    wanted = made({"format": schema})["response_format"]
    assert (wanted["type"], wanted["json_schema"]["schema"]) == ("json_schema", schema)
    assert made({"format": schema, "raw": True}, generate)["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("think", "on", "effort"), [(True, True, None), (False, False, None), ("low", True, "low"), ("max", True, "high")]
)
def test_thinking_is_the_template_s_switch(think: Any, on: bool, effort: str | None) -> None:
    for read in (chat, generate):
        body = made({"think": think}, read)
        assert body["chat_template_kwargs"] == {"enable_thinking": on}
        assert body.get("reasoning_effort") == effort


def test_thinking_that_nobody_speaks_of_is_the_model_s_own_affair() -> None:
    assert "chat_template_kwargs" not in made({})


def test_pictures_come_before_the_text_and_say_what_they_are() -> None:
    parts = made({"messages": [{**USER, "images": [PNG, "/9j/4AAQ"]}]})["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    assert parts[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    alone = made({"prompt": "", "images": [PNG]}, generate)["messages"][0]["content"]
    assert [part["type"] for part in alone] == ["image_url"]


def test_calls_and_results_find_each_other_without_ids() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [CALL, {"function": {"name": "g"}}]},
        {"role": "tool", "tool_name": "g", "content": "two"},
        {"role": "tool", "content": "one"},
    ]
    body = made({"messages": messages})["messages"]
    first, second = body[1]["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": '{"a": 1.5}'}
    assert second["function"] == {"name": "g", "arguments": "{}"}
    assert (body[1]["content"], body[1]["reasoning_content"]) == (None, "Hm.")
    assert [m["tool_call_id"] for m in body[2:]] == [second["id"], first["id"]]
    assert body[2]["name"] == "g"
    assert len(first["id"]) == 9
    assert first["id"].isalnum()
    read_chat(json.dumps({"model": "m", "messages": body}).encode(), max_choices=1, context=100)


def test_ids_that_are_given_are_kept() -> None:
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "x", **CALL}, {"id": "y", **CALL}]},
        {"role": "tool", "tool_call_id": "y", "content": ""},
        {"role": "tool", "tool_name": "f", "content": ""},
    ]
    body = made({"messages": messages})["messages"]
    assert [c["id"] for c in body[1]["tool_calls"]] == ["x", "y"]
    assert [m["tool_call_id"] for m in body[2:]] == ["y", "x"]


def test_arguments_as_openai_writes_them_are_taken() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    body = made({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_tools_pass_as_they_are() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert made({"tools": [tool]})["tools"] == [tool]


def test_a_prompt_is_a_user_s_message_behind_the_system_s() -> None:
    body = made({"system": "Be brief."}, generate)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("more", [{"raw": True}, {"suffix": " end"}, {"raw": True, "suffix": " end"}])
def test_a_raw_prompt_and_one_with_a_suffix_are_completions(more: dict[str, Any]) -> None:
    found = asked(more, generate)
    body = json.loads(found.body("m"))
    assert (found.path, body["prompt"], body.get("suffix")) == (COMPLETIONS, "Hi", more.get("suffix"))
    assert "messages" not in body


def test_a_model_without_a_template_gets_the_prompt_as_it_is() -> None:
    body = json.loads(asked({"options": {"top_k": 3}}, generate).as_completion("m", "m"))
    assert (body["prompt"], body["top_k"], body["stream"]) == ("Hi", 3, True)
    read_completion(json.dumps(body).encode(), max_choices=1, context=100)
    with pytest.raises(BadRequest, match="`system`"):
        asked({"system": "Be brief."}, generate).as_completion("m", "m")


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (chat, {"messages": []}),
        (chat, {"messages": None}),
        (generate, {"prompt": ""}),
        (generate, {"prompt": None}),
        (embed, {}),
        (embed, {"input": []}),
        (embeddings, {"prompt": ""}),
    ],
)
def test_a_request_without_a_prompt_wants_the_model_loaded_or_gone(read: Any, body: dict[str, Any]) -> None:
    assert asked(body, read).load == "load"
    for keep in (0, 0.0, "0", "0s"):
        assert asked({**body, "keep_alive": keep}, read).load == "unload"
    assert asked({**body, "keep_alive": "5m"}, read).load == "load"
    assert asked({"input": "a", "prompt": "a", "messages": [USER], "keep_alive": 0}, read).load is None


def test_a_context_beyond_the_model_s_is_refused_with_both_figures() -> None:
    wanted = asked({"options": {"num_ctx": 8192}})
    wanted.check_context("m", 8192)
    wanted.check_context("m", None)
    with pytest.raises(BadRequest, match=r"8192.*4096") as refused:
        wanted.check_context("m", 4096)
    assert refused.value.param == "options.num_ctx"


@pytest.mark.parametrize(
    ("read", "body", "dropped"),
    [
        (chat, {"keep_alive": "5m", "truncate": True, "shift": False}, ("keep_alive", "truncate")),
        (chat, {"options": {"num_gpu": 99, "num_thread": 4}}, ("options.num_gpu", "options.num_thread")),
        (generate, {"keep_alive": -1}, ("keep_alive",)),
        (generate, {"raw": True, "think": True, "logprobs": True}, ("think", "logprobs")),
        (embed, {"truncate": True, "options": {"num_ctx": 1}}, ("truncate", "options")),
        (embeddings, {"options": {}, "keep_alive": 1}, ("keep_alive",)),
        (chat, {"of_the_future": 1, "options": {"of_the_future": 1}}, ()),
    ],
)
def test_what_is_known_and_not_done_is_named(read: Any, body: dict[str, Any], dropped: tuple[str, ...]) -> None:
    assert asked({"input": "a", **body}, read).dropped == dropped


@pytest.mark.parametrize("name", wire.REFUSED["/api/generate"])
def test_what_would_make_another_answer_is_refused_unless_it_is_empty(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        asked({name: [1] if name == "context" else "x"}, generate)
    assert refused.value.param == name
    for empty in wire.EMPTY:
        asked({name: empty}, generate)


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (chat, {"messages": [{"role": "developer", "content": "a"}]}, "messages[0].role"),
        (chat, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (chat, {"messages": "a"}, "messages"),
        (chat, {"messages": [{**USER, "images": "a"}]}, "messages[0].images"),
        (
            chat,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        *(
            (
                chat,
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": bad}}]}]},
                "messages[0].tool_calls[0].function.arguments",
            )
            for bad in (1, [], "[]", "{")
        ),
        (chat, {"options": {"temperature": "hot"}}, "options.temperature"),
        (chat, {"options": {"top_k": 1.5}}, "options.top_k"),
        (chat, {"format": "yaml"}, "format"),
        (chat, {"format": 1}, "format"),
        (chat, {"think": "hard"}, "think"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (generate, {"raw": True, "system": "a"}, "system"),
        (generate, {"suffix": "a", "images": [PNG]}, "images"),
        (generate, {"prompt": 1}, "prompt"),
        (embed, {"input": [1]}, "input[0]"),
        (embed, {"input": "a", "dimensions": "all"}, "dimensions"),
        (embeddings, {"prompt": ["a"]}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(read: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        asked(body, read)
    assert refused.value.param == param
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("theirs", "ours"), [("stop", "options.stop"), ("max_tokens", "options.num_predict"), ("tools[0].type",) * 2]
)
def test_a_node_s_complaint_names_the_field_as_the_client_wrote_it(theirs: str, ours: str) -> None:
    assert naming(theirs) == ours


def test_embedding_requests_are_openai_s() -> None:
    assert made({"input": ["a", "b"], "dimensions": 8}, embed) == {"model": "m", "input": ["a", "b"], "dimensions": 8}
    assert made({"prompt": "a"}, embeddings) == {"model": "m", "input": "a"}
    assert asked({"input": "a"}, embed).path == "/v1/embeddings"
