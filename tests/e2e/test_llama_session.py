"""The session and its mends against the engine itself: what is asked is what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.aio import run
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange
from tests.helpers.llama_engine import KEY, engine
from tests.helpers.tiny_gguf import chat_model

from helexa.core import sse
from helexa.core.errors import BadRequest, ContextLengthExceeded, HelexaError
from helexa.core.relay.upstream import Upstream
from helexa.neuron.harness.base import Session
from helexa.neuron.harness.collect import Collector

USER = [{"role": "user", "content": "What is 1 and 2? Say it in a few words."}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/N"}},
            "required": ["a", "b"],
            "$defs": {"N": {"type": "integer"}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]
# Qwen's form, as far as it matters: tools in the system message, calls in tags, a thought before the answer.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- 'To call one: <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


class Model:
    """A loaded model, asked as the relay asks it."""

    def __init__(self, address: str, session: Session) -> None:
        self._address = address
        self._session = session

    def ask(self, body: dict[str, Any], path: str = CHAT) -> bytes:
        return run(self._ask({"max_tokens": 48, "temperature": 0} | body, path))

    async def _ask(self, body: dict[str, Any], path: str) -> bytes:
        asked = exchange(body, path)
        prepared = self._session.prepare(asked)
        upstream = Upstream("engine", self._address, headers={"authorization": f"Bearer {KEY}"})
        try:
            answer = await upstream.fetch("POST", path, prepared.body or asked.body, timeout_s=60)
        finally:
            upstream.close()
        if answer.status >= 400:
            error = self._session.refusal(asked, answer.status, answer.body)
            assert error is not None
            raise error
        if prepared.mend is None:
            return answer.body
        return prepared.mend.feed(answer.body) + prepared.mend.finish()

    def raw(self, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
        """The engine's own answer, past the session."""

        async def fetch() -> dict[str, Any]:
            upstream = Upstream("engine", self._address, headers={"authorization": f"Bearer {KEY}"})
            try:
                asked = json.dumps({"max_tokens": 48, "temperature": 0} | body).encode()
                found: dict[str, Any] = (await upstream.fetch("POST", path, asked, timeout_s=60)).json(dict[str, Any])
                return found
            finally:
                upstream.close()

        return run(fetch())

    def whole(self, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ask(body, path))
        return answer

    def streamed(self, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
        raw = self.ask({"stream": True, "stream_options": {"include_usage": True}} | body, path)
        *events, done = sse.EventReader().feed(raw)
        assert done.data == b"[DONE]"
        return [json.loads(event.data) for event in events]

    def learn(self) -> None:
        async def learn() -> None:
            upstream = Upstream("engine", self._address, headers={"authorization": f"Bearer {KEY}"})
            try:
                await self._session.learn(upstream)
            finally:
                upstream.close()

        run(learn())

    def count(self, body: dict[str, Any]) -> int:
        async def count() -> int:
            upstream = Upstream("engine", self._address, headers={"authorization": f"Bearer {KEY}"})
            try:
                return await self._session.count_tokens(json.dumps(body).encode(), upstream)
            finally:
                upstream.close()

        return run(count())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """SmolLM2 with its own template, which knows neither tools nor thoughts."""
    with engine(tmp_path_factory.mktemp("plain")) as (address, session):
        yield Model(address, session)


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with engine(tmp_path_factory.mktemp("tooled"), chat_template=TEMPLATE) as (address, session):
        yield Model(address, session)


@pytest.fixture(params=["plain", "tooled"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def collected(events: list[dict[str, Any]]) -> dict[str, Any]:
    collector = Collector()
    for event in events:
        collector.add(event)
    return collector.answer()


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"messages": USER}, CHAT),
        ({"messages": USER, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}, CHAT),
        ({"messages": USER, "response_format": {"type": "json_object"}}, CHAT),
        ({"prompt": "Once upon a time"}, COMPLETIONS),
    ],
)
def test_an_answer_collected_from_a_stream_is_the_engines_own(plain: Model, body: dict[str, Any], path: str) -> None:
    plain.raw(body, path)  # the prompt is in the cache from now on: the same batches, the same numbers
    own, ours = plain.raw(body, path), plain.whole(body, path)
    for name in ("id", "created", "timings"):
        own.pop(name), ours.pop(name)
    assert ours["choices"][0].pop("stop_reason") is None  # ours alone: the engine tells it beside no choice
    if path == CHAT:  # and the nulls that OpenAI's description requires
        assert ours["choices"][0]["message"].pop("refusal") is None
        if (told := ours["choices"][0]["logprobs"]) is None:
            del ours["choices"][0]["logprobs"]
        else:
            assert told.pop("refusal") is None
    own["usage"].pop("prompt_tokens_details"), ours["usage"].pop("prompt_tokens_details")
    assert _rounded(ours) == _rounded(own)


def _rounded(value: Any) -> Any:
    """Log-probabilities differ by what else is in the batch."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 2) if isinstance(value, float) else value


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_a_call_that_fits_its_schema(model: Model, choice: Any) -> None:
    body = {"messages": USER, "tools": [ADD, NOW], "tool_choice": choice, "max_tokens": 80}
    for answer in (model.whole(body), collected(model.streamed(body))):
        (told,) = answer["choices"]
        assert told["finish_reason"] == "tool_calls"
        (call,) = told["message"]["tool_calls"]
        assert call["id"].startswith("call_")
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "add":
            assert all(type(arguments[key]) is int for key in "ab")
        else:
            assert (choice, call["function"]["name"], arguments) == ("required", "now", {})


def test_beside_a_schema_a_model_answers_by_it_or_calls(model: Model) -> None:
    schema = {"type": "object", "properties": {"sum": {"const": 3}}, "required": ["sum"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    body = {"messages": USER, "tools": [ADD], "response_format": wanted, "max_tokens": 80}
    for answer in (model.whole(body), collected(model.streamed(body))):
        if answer["choices"][0]["finish_reason"] == "tool_calls":
            assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "add"
        else:
            assert json.loads(content(answer)) == {"sum": 3}


def test_the_templates_own_calls_pass_with_their_results(tooled: Model) -> None:
    begun = {"role": "assistant", "content": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool'}
    answer = tooled.whole({"messages": [*USER, begun], "tools": [ADD]})
    assert answer["choices"][0]["finish_reason"] in ("tool_calls", "length", "stop")
    assert tooled.whole({"messages": [*USER, *CALLS], "tools": [ADD]})["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    "body",
    [
        {"messages": USER},
        {"messages": USER, "tools": [ADD, NOW]},
        {"messages": USER, "tools": [ADD], "tool_choice": "required"},
        {"messages": USER, "tools": [ADD], "tool_choice": "none"},
        {"messages": [*USER, *CALLS], "tools": [ADD]},
        {"messages": [*USER, *CALLS]},
        {"messages": [{"role": "system", "content": "<|im_end|> é"}, *USER, {"role": "assistant", "content": "It"}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": USER, "response_format": {"type": "json_object"}},
    ],
)
def test_tokens_are_counted_exactly_as_the_request_has_them(model: Model, body: dict[str, Any]) -> None:
    used = model.whole(body | {"max_tokens": 1})["usage"]
    assert model.count(body) == used["prompt_tokens"]


def test_the_stop_string_that_hit_is_told(plain: Model) -> None:
    free = content(plain.whole({"messages": USER}))
    stop = free[5:9]
    body = {"messages": USER, "stop": ["never said", stop]}
    for answer in (plain.whole(body), collected(plain.streamed(body))):
        assert answer["choices"][0]["stop_reason"] == stop
        assert stop not in content(answer)
    ended = plain.whole({"messages": USER, "stop": ["never said"], "max_tokens": 3})
    assert ended["choices"][0]["stop_reason"] is None


def test_all_choices_are_counted(plain: Model) -> None:
    body = {"messages": USER, "n": 2, "max_tokens": 5, "temperature": 1.0, "seed": 3}
    for answer in (plain.whole(body), collected(plain.streamed(body))):
        assert len(answer["choices"]) == 2
        assert answer["usage"]["completion_tokens"] == 10
        assert answer["usage"]["prompt_tokens"] == plain.count({"messages": USER})
        assert answer["timings"]["predicted_n"] == 10


def test_all_prompts_are_counted(plain: Model) -> None:
    each = [
        plain.whole({"prompt": prompt, "max_tokens": 3}, COMPLETIONS)["usage"]["prompt_tokens"]
        for prompt in ("Once upon a time", "The sky", "One")
    ]
    body = {"prompt": ["Once upon a time", "The sky", "One"], "max_tokens": 3}
    for answer in (plain.whole(body, COMPLETIONS), collected(plain.streamed(body, COMPLETIONS))):
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] == 9
        assert answer["usage"]["prompt_tokens"] == sum(each)


def test_log_probabilities_are_what_was_asked_for(plain: Model) -> None:
    for top in (None, 0, 2):
        body = {"messages": USER, "logprobs": True, "top_logprobs": top, "max_tokens": 2}
        tokens = plain.whole(body)["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in tokens] == [top or 0] * 2
    told = plain.whole({"prompt": "Once", "logprobs": 2, "max_tokens": 2}, COMPLETIONS)["choices"][0]
    assert "".join(told["logprobs"]["tokens"]) == told["text"]
    assert [len(top) for top in told["logprobs"]["top_logprobs"]] == [2, 2]


def test_an_echo_begins_with_the_prompt_and_changes_nothing_else(plain: Model) -> None:
    body = {"prompt": ["Once upon a time", "The sky"], "max_tokens": 3}
    without = [choice["text"] for choice in plain.whole(body, COMPLETIONS)["choices"]]
    for answer in (
        plain.whole(body | {"echo": True}, COMPLETIONS),
        collected(plain.streamed(body | {"echo": True}, COMPLETIONS)),
    ):
        assert [c["text"] for c in answer["choices"]] == [a + b for a, b in zip(body["prompt"], without, strict=True)]


def test_a_suffix_is_filled_in_where_the_model_has_the_tokens_for_it(tmp_path: Path, plain: Model) -> None:
    body = {"prompt": "a b", "suffix": " c d", "max_tokens": 3}
    with pytest.raises(BadRequest) as refused:
        plain.ask(body, COMPLETIONS)
    assert refused.value.param == "suffix"
    marks = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    with engine(tmp_path, chat_model(tmp_path / "coder.gguf", controls=marks)) as (address, session):
        coder = Model(address, session)
        coder.learn()
        written = coder.whole(
            {"prompt": "<|fim_prefix|>a b<|fim_suffix|> c d<|fim_middle|>", "max_tokens": 3}, COMPLETIONS
        )
        filled = coder.whole(body, COMPLETIONS)
    assert filled["choices"][0]["text"] == written["choices"][0]["text"]
    assert filled["usage"]["prompt_tokens"] == written["usage"]["prompt_tokens"] < 15


def test_reasoning_is_counted_apart(tooled: Model) -> None:
    body = {"messages": USER, "grammar": 'root ::= "<think>\\nI see.\\n</think>\\n\\nYes."'}
    for answer in (tooled.whole(body), collected(tooled.streamed(body))):
        assert answer["choices"][0]["message"]["reasoning_content"].strip() == "I see."
        assert content(answer) == "Yes."
        usage = answer["usage"]
        assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_a_schema_binds_chat_and_completion(plain: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 4}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert json.loads(content(plain.whole({"messages": USER, "response_format": wanted}))) == {"n": 4}
    told = plain.whole({"prompt": "A number: ", "response_format": wanted}, COMPLETIONS)
    assert json.loads(told["choices"][0]["text"]) == {"n": 4}


def test_a_prompt_over_the_context_is_refused_with_both_figures(plain: Model) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 3000}]}
    with pytest.raises(ContextLengthExceeded) as refused:
        plain.ask(long)
    assert refused.value.details == {"n_prompt_tokens": plain.count(long), "n_ctx": 2048}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}, "response_format"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"min_p": "x"}, "min_p"),
    ],
)
def test_what_only_the_engine_can_judge_names_its_field_too(plain: Model, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        plain.ask({"messages": USER} | body)
    assert refused.value.param == param


def test_arguments_that_are_no_json_are_the_callers_mistake(tooled: Model) -> None:
    broken = json.loads(json.dumps(CALLS).replace('2}"', '"'))
    with pytest.raises(HelexaError) as refused:
        tooled.ask({"messages": [*USER, *broken]})
    assert (refused.value.status, refused.value.param) == (400, "messages")
