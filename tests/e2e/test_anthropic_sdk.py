"""The official anthropic SDK against a real gateway, node and model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import pytest
from tests.helpers.aio import run
from tests.helpers.neuron_daemon import Daemon
from tests.helpers.published import checked
from tests.helpers.sites import CONTEXT, MODEL, served

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 12,
    "system": "You are brief.",
    "messages": [{"role": "user", "content": "Name a colour."}],
    "extra_body": {"temperature": 0},
}

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Site:
    gateway: Daemon
    node: Daemon

    @property
    def client(self) -> anthropic.Anthropic:
        """All that it gets is held to Anthropic's own description."""
        http = anthropic.DefaultHttpxClient(transport=checked("anthropic", anthropic.DefaultHttpxClient))
        return anthropic.Anthropic(base_url=self.gateway.url, api_key="none", max_retries=0, http_client=http)

    @property
    def async_client(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.gateway.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served(tmp_path_factory.mktemp("anthropic"), f'"claude-haiku" = "{MODEL}"') as (gateway, node):
        yield Site(gateway, node)


def test_a_whole_answer(site: Site) -> None:
    with site.client as client:
        message = client.messages.create(**ASK)
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.role == "assistant"
    assert message.model == MODEL
    assert 0 < message.usage.output_tokens <= 12
    assert message.id.startswith("msg_")


def test_the_stream_says_what_the_whole_answer_says(site: Site) -> None:
    with site.client as client:
        whole = client.messages.create(**ASK)
        with client.messages.stream(**ASK) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_message_start_knows_the_prompt_and_what_of_it_was_cached(site: Site) -> None:
    ask = {**ASK, "messages": [{"role": "user", "content": "Which of all the colours is the warmest one?"}]}
    with site.client as client:
        counted = client.messages.count_tokens(**{k: v for k, v in ask.items() if k in ("model", "system", "messages")})
        for _ in range(2):
            with client.messages.create(**ask, stream=True) as stream:
                events = list(stream)
            start, delta = events[0], events[-2]
            assert start.type == "message_start"
            assert delta.type == "message_delta"
            told = start.message.usage
            assert told.input_tokens + (told.cache_read_input_tokens or 0) == counted.input_tokens
            assert (delta.usage.input_tokens, delta.usage.cache_read_input_tokens) == (
                told.input_tokens,
                told.cache_read_input_tokens,
            )
    assert told.cache_read_input_tokens  # the second time


def test_a_prompt_that_was_never_seen_counts_as_its_request_does(site: Site) -> None:
    """With tools, too. Nothing of it can be in the cache: its very first word is another one."""
    parts: dict[str, Any] = {
        "model": MODEL,
        "system": "Zebras are striped, and this is the first sentence of no other prompt.",
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "auto"},
    }
    with site.client as client:
        counted = client.messages.count_tokens(**parts)
        message = client.messages.create(**parts, max_tokens=4)
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_a_forced_tool_is_called_and_its_result_goes_back(site: Site) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    ask: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 60,
        "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "extra_body": {"temperature": 0},
    }
    with site.client as client:
        whole = client.messages.create(messages=messages, **ask)
        with client.messages.stream(messages=messages, **ask) as stream:
            message = stream.get_final_message()
        assert [b.to_dict() | {"id": ""} for b in whole.content] == [b.to_dict() | {"id": ""} for b in message.content]
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.type == "tool_use"
        assert call.name == "get_weather"
        assert isinstance(call.input, dict)
        assert call.input["city"] in ("Paris", "Rome")
        messages += [
            {"role": "assistant", "content": message.content},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny"}]},
                    {"type": "text", "text": "Say it in a word.", "cache_control": {"type": "ephemeral"}},
                ],
            },
        ]
        answer = client.messages.create(messages=messages, model=MODEL, max_tokens=8, tools=[WEATHER])
    assert answer.usage.output_tokens > 0


def test_any_of_the_tools_and_the_beta_path(site: Site) -> None:
    with site.client as client:
        message = client.beta.messages.create(
            model=MODEL,
            max_tokens=60,
            messages=[{"role": "user", "content": "Weather in Paris?"}],
            tools=[WEATHER],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            thinking={"type": "adaptive"},
            betas=["context-management-2025-06-27"],
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        )
    assert [block.type for block in message.content] == ["tool_use"]


def test_a_stop_sequence_is_told(site: Site) -> None:
    with site.client as client:
        message = client.messages.create(**{**ASK, "max_tokens": 100}, stop_sequences=["e", "a"])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence in ("e", "a")


def test_more_tokens_than_the_context_has_are_cut_down_and_the_context_s_end_is_told(site: Site) -> None:
    """The answer is bound to a list that is longer than what the context leaves."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "array", "items": {"type": "integer"}, "minItems": 400}},
        "required": ["n"],
    }
    with site.client as client:
        ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello " * 940}]}
        form: Any = {"format": {"type": "json_schema", "schema": schema}}
        with client.messages.stream(**ask, max_tokens=32_000, output_config=form) as stream:
            message = stream.get_final_message()
    assert message.stop_reason == "model_context_window_exceeded"
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) + usage.output_tokens == CONTEXT


def test_what_only_anthropic_s_servers_can_run_is_dropped_and_named(site: Site) -> None:
    with site.client as client:
        raw = client.messages.with_raw_response.create(
            **ASK, tools=[{"type": "web_search_20250305", "name": "web_search"}]
        )
        assert raw.headers["x-helexa-dropped"] == "web_search"
        assert raw.headers["request-id"] == raw.headers["x-request-id"]
        with client.messages.with_streaming_response.create(
            **ASK, stream=True, tools=[{"type": "web_search_20250305", "name": "web_search"}]
        ) as streaming:
            assert streaming.headers["x-helexa-dropped"] == "web_search"
            assert streaming.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdk_s_own(site: Site, stream: bool) -> None:
    with site.client as client:
        with pytest.raises(anthropic.NotFoundError) as lost:
            client.messages.create(**{**ASK, "model": "nobody"}, stream=stream)
        assert lost.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0\.text: "):
            client.messages.create(
                **{**ASK, "messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, stream=stream
            )
        with pytest.raises(anthropic.BadRequestError, match=rf"prompt is too long: \d+ tokens > {CONTEXT} maximum"):
            client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "hello " * 2000}]}, stream=stream)
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
        with pytest.raises(anthropic.BadRequestError, match="image"):
            client.messages.create(**{**ASK, "messages": [{"role": "user", "content": [image]}]}, stream=stream)


def test_models_are_listed_in_anthropic_s_shape(site: Site) -> None:
    with site.client as client:
        (listed,) = list(client.models.list())
        assert (listed.id, listed.type, listed.lifecycle) == (MODEL, "model", "active")
        assert listed.max_input_tokens == CONTEXT
        assert client.models.retrieve(MODEL).id == MODEL
        assert client.models.retrieve("claude-haiku").id == MODEL
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("nobody")


def test_an_alias_is_answered_under_the_name_it_was_asked_by(site: Site) -> None:
    with site.client as client:
        assert client.messages.create(**{**ASK, "model": "claude-haiku"}).model == "claude-haiku"


def test_the_async_client(site: Site) -> None:
    async def scenario() -> tuple[Any, Any, int]:
        async with site.async_client as client:
            whole = await client.messages.create(**ASK)
            async with client.messages.stream(**ASK) as stream:
                text = [piece async for piece in stream.text_stream]
                final = await stream.get_final_message()
            counted = await client.messages.count_tokens(model=MODEL, messages=ASK["messages"], system=ASK["system"])
            assert "".join(text) == final.content[0].text
            return whole, final, counted.input_tokens

    whole, final, counted = run(scenario(), timeout_s=120)
    assert whole.content[0].text == final.content[0].text
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_the_request_is_counted_and_told_in_the_log(site: Site) -> None:
    with site.client as client:
        raw = client.messages.with_raw_response.create(**ASK)
    line = site.gateway.wait_for(event="request", request_id=raw.headers["request-id"])
    usage = json.loads(raw.text())["usage"]
    assert line["endpoint"] == "/v1/messages"
    assert line["prompt_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert line["completion_tokens"] == usage["output_tokens"]
    assert line["finish_reason"] in ("stop", "length")
