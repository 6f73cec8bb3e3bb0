"""The official openai SDK's Responses against a real gateway, node and model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.helpers.aio import run
from tests.helpers.neuron_daemon import Daemon
from tests.helpers.published import checked
from tests.helpers.sites import CONTEXT, MODEL, served

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather at a place.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASK: dict[str, Any] = {
    "model": MODEL,
    "max_output_tokens": 12,
    "instructions": "You are brief.",
    "input": "Name a colour.",
    "temperature": 0,
}

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Site:
    gateway: Daemon
    node: Daemon

    @property
    def client(self) -> openai.OpenAI:
        """All that it gets is held to OpenAI's own description."""
        http = openai.DefaultHttpxClient(transport=checked("openai", openai.DefaultHttpxClient))
        return openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0, http_client=http)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served(tmp_path_factory.mktemp("responses"), f'"gpt-small" = "{MODEL}"') as (gateway, node):
        yield Site(gateway, node)


def test_a_whole_answer(site: Site) -> None:
    with site.client as client:
        response = client.responses.create(**ASK)
    assert response.output_text
    assert response.status in ("completed", "incomplete")
    assert response.model == MODEL
    assert response.usage is not None
    assert 0 < response.usage.output_tokens <= 12
    assert response.id.startswith("resp_")
    assert response.instructions == "You are brief."


def test_the_stream_says_what_the_whole_answer_says(site: Site) -> None:
    with site.client as client:
        whole = client.responses.create(**ASK)
        events = list(client.responses.create(**ASK, stream=True))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_stream_helper_collects_a_response(site: Site) -> None:
    with site.client as client, client.responses.stream(**{**ASK, "max_output_tokens": 60}) as stream:
        for event in stream:
            if event.type == "response.output_text.done":
                said = event.text
        final = stream.get_final_response()
    assert final.output_text == said


def test_a_conversation_goes_on_by_id_and_is_kept_until_it_is_deleted(site: Site) -> None:
    with site.client as client:
        first = client.responses.create(**ASK)
        second = client.responses.create(model=MODEL, input="Another?", previous_response_id=first.id, temperature=0)
        by_hand = client.responses.create(
            model=MODEL,
            input=[
                {"role": "user", "content": "Name a colour."},
                *[item.to_dict() for item in first.output],
                {"role": "user", "content": "Another?"},
            ],
            temperature=0,
            store=False,
        )
        assert second.output_text == by_hand.output_text
        assert second.usage is not None
        assert by_hand.usage is not None
        assert second.usage.input_tokens == by_hand.usage.input_tokens
        assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
        items = list(client.responses.input_items.list(second.id, order="asc", limit=1))  # three pages
        assert [item.type for item in items] == ["message"] * 3
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as lost:
            client.responses.create(model=MODEL, input="And?", previous_response_id=second.id)
        assert lost.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(by_hand.id)


def test_a_prompt_counts_as_its_request_does(site: Site) -> None:
    with site.client as client:
        first = client.responses.create(**ASK)
        ask: dict[str, Any] = {"model": MODEL, "input": "And in Rome?", "tools": [WEATHER]}
        counted = client.responses.input_tokens.count(**ask, previous_response_id=first.id)
        response = client.responses.create(**ask, previous_response_id=first.id, max_output_tokens=4)
    assert response.usage is not None
    assert response.usage.input_tokens == counted.input_tokens
    assert counted.object == "response.input_tokens"


def test_what_is_kept_belongs_to_its_key(site: Site) -> None:
    with site.client as client:
        first = client.responses.create(**ASK)
        with pytest.raises(openai.NotFoundError):
            client.with_options(api_key="another").responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="background"):
            client.responses.cancel(first.id)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_function_is_called_and_its_result_goes_back(site: Site, choice: Any) -> None:
    ask: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    with site.client as client:
        whole = client.responses.create(input="What is the weather in Rome?", **ask)
        with client.responses.stream(input="What is the weather in Rome?", **ask) as stream:
            response = stream.get_final_response()
        (call,) = response.output
        assert call.type == "function_call"
        assert whole.output[0].type == "function_call"
        assert (call.name, call.arguments) == (whole.output[0].name, whole.output[0].arguments)
        assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
        answer = client.responses.create(
            model=MODEL, input=[result], previous_response_id=response.id, max_output_tokens=8, tools=[WEATHER]
        )
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


def test_a_custom_tool_and_one_in_a_namespace_are_called_as_the_client_knows_them(site: Site) -> None:
    shell: Any = {"type": "custom", "name": "shell", "description": "Runs a command."}
    inner = {"type": "function", "name": "find", "parameters": WEATHER["parameters"], "strict": True}
    home: Any = {"type": "namespace", "name": "home", "description": "Of the house.", "tools": [inner]}
    ask: dict[str, Any] = {"model": MODEL, "input": "List the files.", "tools": [shell, home], "temperature": 0}
    with site.client as client:
        choice: Any = {"type": "custom", "name": "shell"}
        events = list(client.responses.create(**ask, tool_choice=choice, max_output_tokens=40, stream=True))
        item = events[-1].response.output[0]  # type: ignore[union-attr]
        assert item.type == "custom_tool_call"
        assert item.name == "shell"
        deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == item.input
        # only these are allowed, so that one of the namespace is what it has to be
        allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]}
        (call,) = client.responses.create(**ask, tool_choice=allowed).output
        assert call.type == "function_call"
        assert (call.name, call.namespace) == ("find", "home")


class Choice(BaseModel):
    colour: Literal["red", "blue"]


def test_a_schema_binds_the_text(site: Site) -> None:
    with site.client as client:
        parsed = client.responses.parse(model=MODEL, input="Red or blue?", text_format=Choice, temperature=0)
        assert isinstance(parsed.output_parsed, Choice)
        with client.responses.stream(model=MODEL, input="Red or blue?", text_format=Choice, temperature=0) as stream:
            assert stream.get_final_response().output_parsed == parsed.output_parsed
        free: Any = {"format": {"type": "json_object"}}
        response = client.responses.create(model=MODEL, input="Some JSON.", text=free, max_output_tokens=40)
        assert response.status == "incomplete" or isinstance(json.loads(response.output_text), dict)


def test_an_answer_that_the_limit_cut_off_is_incomplete(site: Site) -> None:
    ask: dict[str, Any] = {**ASK, "input": "Tell me a long story.", "max_output_tokens": 8}
    with site.client as client:
        response = client.responses.create(**ask)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        (item,) = response.output
        assert item.type == "message"
        assert item.status == "incomplete"
        assert response.usage is not None
        assert response.usage.output_tokens == 8


def test_log_probabilities_come_with_the_text(site: Site) -> None:
    ask: dict[str, Any] = {**ASK, "max_output_tokens": 3, "top_logprobs": 2}
    with site.client as client:
        whole = client.responses.create(**ask)
        events = list(client.responses.create(**ask, stream=True))
    (item,) = whole.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
    told = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [token.token for token in told] == [token.token for token in part.logprobs]


def test_what_only_openai_can_run_is_dropped_and_named(site: Site) -> None:
    tools: Any = [{"type": "web_search"}, {"type": "mcp", "server_label": "wiki", "server_url": "https://x"}]
    with site.client as client:
        raw = client.responses.with_raw_response.create(**ASK, tools=tools, truncation="auto")
        assert raw.headers["x-helexa-dropped"] == "truncation, web_search, wiki"
        assert raw.parse().tools == []


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdk_s_own(site: Site, stream: bool) -> None:
    with site.client as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.responses.create(**{**ASK, "model": "nobody"}, stream=stream)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.responses.create(**{**ASK, "input": [{"role": "user", "content": 7}]}, stream=stream)
        assert wrong.value.param == "input[0].content"
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**ASK, background=True, stream=stream)
        assert refused.value.param == "background"
        with pytest.raises(openai.BadRequestError, match=rf"maximum context length is {CONTEXT} tokens") as too_long:
            client.responses.create(**{**ASK, "input": "hello " * 2000}, stream=stream)
        assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "input")
        image = {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,iVBORw0KGgo="}
        with pytest.raises(openai.BadRequestError) as blind:
            client.responses.create(**{**ASK, "input": [{"role": "user", "content": [image]}]}, stream=stream)
        assert blind.value.code == "unsupported_modality"


def test_an_alias_is_answered_under_the_name_it_was_asked_by(site: Site) -> None:
    with site.client as client:
        assert client.responses.create(**{**ASK, "model": "gpt-small"}).model == "gpt-small"


def test_the_async_client(site: Site) -> None:
    async def scenario() -> tuple[Any, Any]:
        async with site.async_client as client:
            whole = await client.responses.create(**ASK)
            text = ""
            async for event in await client.responses.create(**ASK, stream=True):
                if event.type == "response.output_text.delta":
                    text += event.delta
            on = await client.responses.create(model=MODEL, input="And?", previous_response_id=whole.id, store=False)
            assert on.output_text
            return whole, text

    whole, text = run(scenario(), timeout_s=120)
    assert whole.output_text == text


def test_the_request_is_counted_and_told_in_the_log(site: Site) -> None:
    with site.client as client:
        raw = client.responses.with_raw_response.create(**ASK)
    line = site.gateway.wait_for(event="request", request_id=raw.headers["x-request-id"])
    usage = raw.parse().usage
    assert usage is not None
    assert line["endpoint"] == "/v1/responses"
    assert line["prompt_tokens"] == usage.input_tokens
    assert line["completion_tokens"] == usage.output_tokens
    assert line["finish_reason"] in ("stop", "length")
