"""What a request becomes before the engine sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange, session

from helexa.core.errors import BadRequest, UnsupportedModality, WrongTask
from helexa.neuron.harness.base import Prepared

MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TOOLED = session(abilities=("chat", "tools"))


def sent(prepared: Prepared) -> dict[str, Any]:
    assert prepared.body is not None
    body: dict[str, Any] = json.loads(prepared.body)
    return body


def test_an_ordinary_chat_passes_byte_for_byte() -> None:
    for body in ({"messages": MESSAGES}, {"messages": MESSAGES, "temperature": 0.2, "seed": 7, "top_k": 5, "odd": [1]}):
        assert session().prepare(exchange(body)) == Prepared()


def test_a_streamed_chat_only_asks_for_its_role_chunk() -> None:
    assert session().prepare(exchange({"messages": MESSAGES, "stream": True})) == Prepared(first_event=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"stream":true,"messages":M}', b'{"stream_options":{"include_usage":true},"stream":true,"messages":M}'),
        (
            b'{"stream":true,"stream_options":null,"messages":M}',
            b'{"stream":true,"stream_options":{"include_usage":true},"messages":M}',
        ),
        (
            b'{"stream":true,"stream_options": {"include_usage":false} ,"messages":M}',
            b'{"stream":true,"stream_options": {"include_usage":true} ,"messages":M}',
        ),
        (b'{"stream":true,"stream_options":{"include_usage":true},"messages":M}', None),
        (b'{"messages":M}', None),
    ],
)
def test_usage_is_asked_for_where_the_gateway_wants_it(before: bytes, after: bytes | None) -> None:
    messages = json.dumps(MESSAGES).encode()
    prepared = session().prepare(exchange(before.replace(b"M", messages), gateway_usage=True))
    assert prepared.body == (None if after is None else after.replace(b"M", messages))


def test_text_that_looks_like_the_key_is_left_alone() -> None:
    body = {"messages": [{"role": "user", "content": 'say "stream_options": null'}], "stream": True}
    prepared = session().prepare(exchange(body, gateway_usage=True))
    assert sent(prepared) == body | {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("task", "path", "fits"),
    [
        ("chat", CHAT, True),
        ("chat", COMPLETIONS, True),
        ("chat", "/v1/embeddings", False),
        ("chat", "/v1/rerank", False),
        ("completion", CHAT, False),
        ("completion", COMPLETIONS, True),
        ("embed", "/v1/embeddings", True),
        ("embed", CHAT, False),
        ("rerank", "/v1/rerank", True),
        ("rerank", "/v1/embeddings", False),
    ],
)
def test_each_task_answers_its_own_endpoints(task: str, path: str, fits: bool) -> None:
    body = {"messages": MESSAGES, "prompt": "a", "input": "a", "query": "q", "documents": ["d"]}
    if fits:
        session(task).prepare(exchange(body, path))
    else:
        with pytest.raises(WrongTask, match="use /v1/"):
            session(task).prepare(exchange(body, path))


def test_images_need_a_model_that_sees() -> None:
    with pytest.raises(UnsupportedModality) as refused:
        session().prepare(exchange({"messages": [*MESSAGES, IMAGE]}))
    assert refused.value.param == "messages[1].content[0]"
    assert session(abilities=("chat", "vision")).prepare(exchange({"messages": [IMAGE]})) == Prepared()


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "HTTPS://a/b", "file:///etc/passwd", ""])
def test_images_come_with_the_request_and_are_fetched_from_nowhere(url: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    with pytest.raises(BadRequest, match="data: URL") as refused:
        session(abilities=("chat", "vision")).prepare(exchange({"messages": [message]}))
    assert refused.value.param == "messages[0].content[0].image_url.url"


def test_audio_and_unknown_parts_are_refused_by_place() -> None:
    audio = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]}
    with pytest.raises(UnsupportedModality) as refused:
        session(abilities=("chat", "vision")).prepare(exchange({"messages": [audio]}))
    assert refused.value.param == "messages[0].content[1]"
    with pytest.raises(BadRequest) as unknown:
        session().prepare(exchange({"messages": [{"role": "user", "content": [{"type": "file"}]}]}))
    assert unknown.value.param == "messages[0].content[0].type"


def test_a_whole_answer_that_needs_mending_is_asked_as_a_stream_and_told_as_json() -> None:
    prepared = session().prepare(exchange({"messages": MESSAGES, "stop": ["x"]}))
    asked = sent(prepared)
    assert (asked["stream"], asked["stream_options"], asked["verbose"]) == (True, {"include_usage": True}, True)
    assert prepared.content_type == b"application/json"
    assert prepared.mend is not None
    assert not prepared.first_event


def test_a_stream_that_needs_mending_stays_one() -> None:
    prepared = session().prepare(exchange({"messages": MESSAGES, "n": 2, "stream": True}))
    assert prepared.body is None
    assert prepared.mend is not None
    assert prepared.content_type is None
    assert prepared.first_event


def test_reasoning_is_counted_where_usage_is_told() -> None:
    thinker = session(abilities=("chat", "reasoning"))
    assert sent(thinker.prepare(exchange({"messages": MESSAGES})))["timings_per_token"] is True
    unasked = thinker.prepare(exchange({"messages": MESSAGES, "stream": True}))
    assert unasked == Prepared(first_event=True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_becomes_a_response_format_and_the_tools_stay_in_the_prompt(choice: Any) -> None:
    asked = sent(TOOLED.prepare(exchange({"messages": MESSAGES, "tools": [ADD], "tool_choice": choice})))
    assert asked["tools"] == [ADD]
    assert asked["messages"] == MESSAGES
    assert asked["tool_choice"] == "none"
    schema = asked["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["name"] == {"const": "add"}
    assert list(schema["properties"]) == ["name", "arguments"]


def test_a_named_call_allows_that_function_only() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    body = {
        "messages": MESSAGES,
        "tools": [ADD, other],
        "tool_choice": {"type": "function", "function": ADD["function"]},
    }
    schema = sent(TOOLED.prepare(exchange(body)))["response_format"]["json_schema"]["schema"]
    assert "anyOf" not in schema
    body["tool_choice"] = "required"
    schema = sent(TOOLED.prepare(exchange(body)))["response_format"]["json_schema"]["schema"]
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["add", "other"]


def test_a_template_that_knows_tools_gets_them_untouched() -> None:
    assert TOOLED.prepare(exchange({"messages": MESSAGES, "tools": [ADD]})) == Prepared()


def test_a_template_without_tools_is_told_of_them_in_text() -> None:
    asked = sent(session().prepare(exchange({"messages": MESSAGES, "tools": [ADD]})))
    assert asked["tools"] is None
    system, user = asked["messages"]
    assert system["role"] == "system"
    assert '{"name":"add","parameters":{"type":"object","properties":{}}}' in system["content"]
    assert user == MESSAGES[0]


def test_calls_and_results_reach_a_template_without_tools_as_text() -> None:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"a":{i}}}'}} for i in (1, 2)
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "4"}]},
    ]
    asked = sent(session().prepare(exchange({"messages": messages})))["messages"]
    assert asked == [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {
            "role": "assistant",
            "content": '{"name": "add", "arguments": {"a":1}}\n{"name": "add", "arguments": {"a":2}}',
        },
        {"role": "user", "content": "add returned: 3\nadd returned: 4"},
    ]


def test_nothing_is_ever_put_into_a_prompt_without_tools() -> None:
    messages = [{"role": "system", "content": "Verbatim."}, *MESSAGES]
    for abilities in (("chat",), ("chat", "tools"), ("chat", "tools", "reasoning")):
        prepared = session(abilities=abilities).prepare(exchange({"messages": messages, "n": 2, "stop": "x"}))
        assert sent(prepared)["messages"] == messages


def test_log_probabilities_without_alternatives_are_asked_with_one() -> None:
    assert sent(session().prepare(exchange({"messages": MESSAGES, "logprobs": True})))["top_logprobs"] == 1
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    assert session().prepare(exchange(body)) == Prepared()


def test_a_completion_honours_a_response_format_as_its_schema() -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}
    asked = sent(session().prepare(exchange({"prompt": "a", "response_format": wanted}, COMPLETIONS)))
    assert asked["json_schema"] == {"type": "array"}


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2], [[1, 2]]])
def test_one_prompt_needs_no_mend_in_any_form(prompt: Any) -> None:
    assert session().prepare(exchange({"prompt": prompt}, COMPLETIONS)) == Prepared()


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_need_one(prompt: Any) -> None:
    assert session().prepare(exchange({"prompt": prompt}, COMPLETIONS)).mend is not None


def test_dimensions_can_only_be_the_models_own() -> None:
    embedder = session("embed", extra={"n_embd": 64})
    assert embedder.prepare(exchange({"input": "a", "dimensions": 64}, "/v1/embeddings")) == Prepared()
    with pytest.raises(BadRequest, match="64 dimensions") as refused:
        embedder.prepare(exchange({"input": "a", "dimensions": 32}, "/v1/embeddings"))
    assert refused.value.param == "dimensions"


def test_documents_to_rank_reach_the_engine_as_texts() -> None:
    ranker = session("rerank")
    assert ranker.prepare(exchange({"query": "q", "documents": ["a"]}, "/v1/rerank")) == Prepared()
    body = {"query": "q", "documents": [{"text": "a", "id": 1}, "b"]}
    assert sent(ranker.prepare(exchange(body, "/v1/rerank")))["documents"] == ["a", "b"]
