"""What a request becomes before the engine sees it."""

from __future__ import annotations

import base64
import json
import math
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.aio import run
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange, session
from tests.helpers.wires import split

from helexa.core.errors import BadRequest, UnsupportedModality, WrongTask
from helexa.core.relay.upstream import Answer, Upstream
from helexa.neuron.harness import infill
from helexa.neuron.harness.base import Prepared
from helexa.neuron.harness.llama.mends_embeddings import Cut

MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TOOLED = session(abilities=("chat", "tools"))


def sent(prepared: Prepared) -> dict[str, Any]:
    assert prepared.body is not None
    body: dict[str, Any] = json.loads(prepared.body)
    return body


def test_an_ordinary_stream_only_gets_what_lets_the_engine_notice_a_client_that_left() -> None:
    body = b' {"messages":[{"role":"user","content":"hi"}], "stream" : true,"temperature":2e-1,"odd":[1.50]}'
    prepared = session().prepare(exchange(body))
    assert prepared == Prepared(
        body=b' {"return_progress":true,' + body[2:], mend=None, first_event=True, cut_progress=True
    )


def test_progress_is_shown_to_a_client_that_asked_for_it() -> None:
    body = {"messages": MESSAGES, "stream": True, "return_progress": True}
    assert session().prepare(exchange(body)) == Prepared(first_event=True)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("more", [{}, {"stream": None}, {"stream": False, "stream_options": None}])
def test_a_whole_answer_is_asked_as_a_stream_and_told_as_json(path: str, more: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "prompt": "a"} | more
    prepared = session().prepare(exchange(body, path))
    assert sent(prepared) == body | {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    assert prepared.content_type == b"application/json"
    assert prepared.mend is not None
    assert (prepared.first_event, prepared.cut_progress) == (False, False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"stream":true', b'"return_progress":true,"stream":true,"stream_options":{"include_usage":true}'),
        (b'"stream_options":null', b'"return_progress":true,"stream_options":{"include_usage":true}'),
        (
            b'"stream_options": {"include_usage":false} ',
            b'"return_progress":true,"stream_options": {"include_usage":true} ',
        ),
        (b'"stream_options":{"include_usage":true}', b'"return_progress":true,"stream_options":{"include_usage":true}'),
        (b'"return_progress":false', b'"stream_options":{"include_usage":true},"return_progress":true'),
        (b'"return_progress":true', b'"stream_options":{"include_usage":true},"return_progress":true'),
    ],
)
def test_usage_is_asked_for_where_the_gateway_wants_it(before: bytes, after: bytes) -> None:
    rest = b'"messages":[{"role":"user","content":"say \\"stream_options\\": null"}]}'
    stream = b"" if b'"stream"' in before else b'"stream":true,'
    asked = b"{" + before + b"," + stream + rest
    body = session().prepare(exchange(asked, gateway_usage=True)).body
    assert body is not None
    wanted = json.loads(b"{" + after + b"," + stream + rest)
    assert json.loads(body) == wanted
    assert body.endswith(rest)


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
    seen = session(abilities=("chat", "vision")).prepare(exchange({"messages": [IMAGE], "stream": True}))
    assert sent(seen)["messages"] == [IMAGE]


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


def test_a_stream_that_needs_mending_stays_one() -> None:
    prepared = session().prepare(exchange({"messages": MESSAGES, "n": 2, "stream": True}))
    assert prepared.mend is not None
    assert prepared.content_type is None
    assert prepared.first_event


def test_reasoning_is_counted_where_usage_is_told() -> None:
    thinker = session(abilities=("chat", "reasoning"))
    assert sent(thinker.prepare(exchange({"messages": MESSAGES})))["timings_per_token"] is True
    assert thinker.prepare(exchange({"messages": MESSAGES, "stream": True})).mend is None


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


WANTED = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}}}}


@pytest.mark.parametrize("more", [{"response_format": WANTED}, {"json_schema": WANTED["json_schema"]["schema"]}])
def test_a_schema_beside_tools_allows_either(more: dict[str, Any]) -> None:
    prepared = TOOLED.prepare(exchange({"messages": MESSAGES, "tools": [ADD], "stream": True} | more))
    asked = sent(prepared)
    call, answer = asked["response_format"]["json_schema"]["schema"]["anyOf"]
    assert call["properties"]["name"] == {"const": "add"}
    assert answer == {"$ref": "#/$defs/answer"}
    assert asked["response_format"]["json_schema"]["schema"]["$defs"]["answer"]["$ref"] == "#/$defs/answer/$defs/A"
    assert asked.get("json_schema") is None
    assert prepared.mend is not None


def test_a_schema_beside_tools_that_may_not_be_called_stays_alone() -> None:
    body = {"messages": MESSAGES, "tools": [ADD], "tool_choice": "none", "response_format": WANTED, "stream": True}
    prepared = TOOLED.prepare(exchange(body))
    assert prepared.mend is None
    assert sent(prepared)["response_format"] == WANTED


@pytest.mark.parametrize("abilities", [("chat",), ("chat", "tools")])
def test_a_grammar_leaves_no_room_for_a_forced_call(abilities: tuple[str, ...]) -> None:
    body = {"messages": MESSAGES, "tools": [ADD], "tool_choice": "required", "grammar": "root ::= x"}
    with pytest.raises(BadRequest) as refused:
        session(abilities=abilities).prepare(exchange(body))
    assert refused.value.param == "grammar"


def test_a_template_that_knows_tools_gets_them_untouched() -> None:
    prepared = TOOLED.prepare(exchange({"messages": MESSAGES, "tools": [ADD], "stream": True}))
    assert prepared.mend is None
    assert sent(prepared)["tools"] == [ADD]


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


def test_keys_of_a_tool_that_are_null_are_left_out_and_its_schema_stays_as_written() -> None:
    """As `llm` sends a function without a docstring; the engine wants a text there."""
    schema = b'{"type":"object","properties":{"n":{"type":"number","maximum":1.50,"default":null}}}'
    function = b'{"name":"add","description":null,"strict": null ,"parameters":' + schema + b"}"
    body = b'{"stream":true,"messages":[{"role":"user","content":"hi"}],"tools":[{"type":"function","function":%b}]}'
    prepared = TOOLED.prepare(exchange(body % function))
    assert prepared.body is not None
    assert b'"tools":[{"type":"function","function":{"name":"add","parameters":' + schema + b"}}]" in prepared.body


SYSTEM_APART = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "hi"},
    {"role": "system", "content": "b"},
]


def test_system_messages_become_one_where_the_template_takes_only_one() -> None:
    asked = {"messages": SYSTEM_APART, "stream": True}
    body = sent(session(merge_system=True).prepare(exchange(asked)))
    assert body["messages"] == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "hi"}]
    for takes_them in (session(merge_system=False), session()):
        assert sent(takes_them.prepare(exchange(asked)))["messages"] == SYSTEM_APART


def test_system_messages_become_one_before_tools_are_told_in_text() -> None:
    asked = {"messages": SYSTEM_APART, "stream": True, "tools": [ADD]}
    first, *rest = sent(session(merge_system=True).prepare(exchange(asked)))["messages"]
    assert first["content"].startswith("a\n\nb\n\nYou can call")
    assert rest == [{"role": "user", "content": "hi"}]


def test_nothing_is_ever_put_into_a_prompt_without_tools() -> None:
    messages = [{"role": "system", "content": "Verbatim."}, *MESSAGES]
    for abilities in (("chat",), ("chat", "tools"), ("chat", "tools", "reasoning")):
        prepared = session(abilities=abilities).prepare(exchange({"messages": messages, "n": 2, "stop": "x"}))
        assert sent(prepared)["messages"] == messages


def test_log_probabilities_without_alternatives_are_asked_with_one() -> None:
    assert sent(session().prepare(exchange({"messages": MESSAGES, "logprobs": True})))["top_logprobs"] == 1
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    mend = session().prepare(exchange(body | {"stream": True})).mend
    assert mend is not None
    event = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"logprobs":{"content":[]}}]}\n\n'
    assert b'"refusal":null' in mend.feed(event)  # as OpenAI's description has it


class Tokenizer(Upstream):
    """Knows these as one token each, and nothing else."""

    def __init__(self, *known: str) -> None:
        super().__init__("engine", "unix:/nowhere")
        self._known = known

    async def fetch(self, method: str, path: str, body: bytes | None = None, **more: Any) -> Answer:
        assert body is not None
        asked = json.loads(body)
        if path != "/tokenize":
            return Answer(404, {}, b"{}")
        assert asked["parse_special"]
        assert not asked["add_special"]
        text: str = asked["content"]
        for known in self._known:
            text = text.replace(known, "\0")
        return Answer(200, {}, json.dumps({"tokens": list(text)}).encode())


@pytest.mark.parametrize("marks", infill.KNOWN)
def test_a_suffix_is_filled_in_with_the_model_s_own_tokens(marks: infill.Marks) -> None:
    model = session()
    run(model.learn(Tokenizer(marks.prefix, marks.suffix, marks.middle)))
    body = json.loads(model.prepare(exchange({"prompt": "a", "suffix": "b"}, COMPLETIONS)).body or b"")
    assert body["prompt"] == f"{marks.prefix}a{marks.suffix}b{marks.middle}"
    assert body["suffix"] is None


def test_a_suffix_for_a_model_that_cannot_fill_in_is_refused() -> None:
    model = session()
    run(model.learn(Tokenizer()))
    with pytest.raises(BadRequest) as refused:
        model.prepare(exchange({"prompt": "a", "suffix": "b"}, COMPLETIONS))
    assert refused.value.param == "suffix"


def test_a_completion_honours_a_response_format_as_its_schema() -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}
    asked = sent(session().prepare(exchange({"prompt": "a", "response_format": wanted}, COMPLETIONS)))
    assert asked["json_schema"] == {"type": "array"}


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2], [[1, 2]]])
def test_one_prompt_needs_no_mend_in_any_form(prompt: Any) -> None:
    assert session().prepare(exchange({"prompt": prompt, "stream": True}, COMPLETIONS)).mend is None


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_need_one(prompt: Any) -> None:
    assert session().prepare(exchange({"prompt": prompt, "stream": True}, COMPLETIONS)).mend is not None


def test_dimensions_are_the_model_s_own_unless_its_profile_says_that_it_bears_a_cut() -> None:
    geometry = {"geometry": SimpleNamespace(n_embd=64)}
    embedder = session("embed", extra=geometry)
    assert embedder.prepare(exchange({"input": "a", "dimensions": 64}, "/v1/embeddings")) == Prepared()
    with pytest.raises(BadRequest, match="64 dimensions") as refused:
        embedder.prepare(exchange({"input": "a", "dimensions": 32}, "/v1/embeddings"))
    assert refused.value.param == "dimensions"
    bearing = session("embed", abilities=("embed", "dimensions"), extra=geometry)
    assert isinstance(bearing.prepare(exchange({"input": "a", "dimensions": 32}, "/v1/embeddings")).mend, Cut)
    with pytest.raises(BadRequest, match="64 at most"):
        bearing.prepare(exchange({"input": "a", "dimensions": 65}, "/v1/embeddings"))


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8),
    st.integers(1, 8),
    st.lists(st.integers(0, 400), max_size=3),
)
def test_a_cut_embedding_has_length_one_again_in_either_form(vector: list[float], size: int, cuts: list[int]) -> None:
    coded = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    data = json.dumps({"data": [{"embedding": vector}, {"embedding": coded}], "usage": {"prompt_tokens": 3}}).encode()
    mend = Cut(size)
    assert [mend.feed(part) for part in split(data, cuts)] == [b""] * len(split(data, cuts))
    answer = json.loads(mend.finish())
    plain, read = (entry["embedding"] for entry in answer["data"])
    assert struct.unpack(f"<{len(plain)}f", base64.b64decode(read)) == pytest.approx(plain, abs=1e-6)
    assert len(plain) == min(size, len(vector))
    length = math.hypot(*vector[:size])
    assert [x * length for x in plain] == pytest.approx(vector[:size], abs=1e-6)
    if length:
        assert math.hypot(*plain) == pytest.approx(1)
    assert answer["usage"] == {"prompt_tokens": 3}


def test_a_null_encoding_is_the_default() -> None:
    embedder = session("embed")
    asked = sent(embedder.prepare(exchange({"input": "a", "encoding_format": None}, "/v1/embeddings")))
    assert asked["encoding_format"] == "float"
    assert embedder.prepare(exchange({"input": "a", "encoding_format": "base64"}, "/v1/embeddings")) == Prepared()


def test_schemas_nested_without_end_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    with pytest.raises(BadRequest) as refused:
        TOOLED.prepare(exchange({"messages": MESSAGES, "tools": [tool], "tool_choice": "required"}))
    assert refused.value.param in ("tools", None)


def test_documents_to_rank_reach_the_engine_as_texts() -> None:
    ranker = session("rerank")
    assert ranker.prepare(exchange({"query": "q", "documents": ["a"]}, "/v1/rerank")) == Prepared()
    body = {"query": "q", "documents": [{"text": "a", "id": 1}, "b"]}
    assert sent(ranker.prepare(exchange(body, "/v1/rerank")))["documents"] == ["a", "b"]
