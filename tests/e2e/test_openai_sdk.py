"""The openai SDK against the real thing: cortex, neuron, an engine of either harness and two models, all of them
processes of their own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI
from tests.helpers.gateway import PATIENT, cortex_process
from tests.helpers.models import gemma, smollm2
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.published import checked
from tests.helpers.safetensors_models import smollm2 as safetensors_smollm2
from tests.helpers.torch_serving import need_torch

ASK: dict[str, Any] = {
    "model": "small",  # the alias: it need not be rewritten anywhere on the way
    "messages": [{"role": "user", "content": "Name a colour."}],
    "temperature": 0,
    "max_tokens": 8,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
COLOUR: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "colour",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
CATALOGUE = """
[[models]]
id = "smollm2"
source = "{smollm2}"
context = 1024
slots = 4
threads = 2
{more}

[[models]]
id = "gemma"
source = "{gemma}"
context = 512
slots = 1
threads = 2

[aliases]
small = "smollm2"
"""

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Site:
    node: Daemon
    gateway: Daemon
    client: OpenAI

    @property
    def base_url(self) -> str:
        return f"{self.gateway.url}/v1"

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of this metric that have these labels."""
        address = self.gateway.wait_for(event="listening")["metrics"]
        lines = type(self.gateway.http)(f"http://{address}").get("/metrics").text.splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith(f"{name}{{") and all(w in line for w in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.fixture(scope="module", params=["process", "none", "torch", "torch on two ranks"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """process, none: how a GGUF is isolated. torch: the same model of safetensors, on a node that isolates nothing."""
    folder: Path = tmp_path_factory.mktemp("site")
    source, more = smollm2(), ""
    if request.param.startswith("torch"):
        need_torch()
        source = safetensors_smollm2()
        more = "tensor_parallel = 2" if request.param.endswith("ranks") else ""
    models = CATALOGUE.format(smollm2=source, gemma=gemma(), more=more)
    settings = f'isolation = "{"process" if request.param == "process" else "none"}"'
    with (
        neuron(folder, settings) as node,
        cortex_process(folder, {"local": node.url}, toml=PATIENT, models=models) as gateway,
    ):
        gateway.wait_for(event="node is up")
        http = DefaultHttpxClient(transport=checked("openai", DefaultHttpxClient), timeout=120)
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, http_client=http) as client:
            yield Site(node, gateway, client)


@pytest.fixture
def client(site: Site) -> OpenAI:
    return site.client


# answers


def test_a_model_that_is_not_loaded_is_loaded_by_asking_for_it(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ASK)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert 0 < answer.usage.completion_tokens <= ASK["max_tokens"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer_and_begins_with_the_role(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)  # asked for by the gateway only
    timings: Any = (chunks[-1].model_extra or {})["timings"]  # which stand in the engine's usage
    assert whole.usage is not None
    assert timings["predicted_n"] == whole.usage.completion_tokens
    assert chunks[-1].choices[0].model_extra == whole.choices[0].model_extra == {"stop_reason": None}


def test_a_stream_tells_its_usage_to_those_who_ask(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    last = chunks[-1]
    assert (last.choices, last.usage is not None) == ([], True)
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_several_at_once_are_all_answered_over_the_async_client(site: Site) -> None:
    async def one(client: AsyncOpenAI, number: int) -> str:
        ask = {**ASK, "messages": [{"role": "user", "content": f"Count from {number}."}]}
        if number % 2:
            return (await client.chat.completions.create(**ask)).choices[0].message.content or ""
        stream = await client.chat.completions.create(**ask, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def scenario() -> list[str]:
        async with AsyncOpenAI(base_url=site.base_url, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, number) for number in range(6)))

    assert all(asyncio.run(scenario()))


def test_a_second_model_is_served_beside_the_first(client: OpenAI) -> None:
    answer = client.completions.create(model="gemma", prompt="The sea is", max_tokens=6, temperature=0)
    assert answer.choices[0].text
    chunks = list(
        client.completions.create(model="gemma", prompt="The sea is", max_tokens=6, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text


def test_several_choices_each_come_whole(client: OpenAI) -> None:
    answer = client.chat.completions.create(**{**ASK, "temperature": 1.0, "max_tokens": 4}, n=2, seed=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert all(choice.message.content for choice in answer.choices)


def test_a_seed_repeats_an_answer(client: OpenAI) -> None:
    ask = {**ASK, "temperature": 1.0, "seed": 42}
    first, second = (client.chat.completions.create(**ask).choices[0].message.content for _ in range(2))
    assert first == second


def test_a_stop_string_ends_it_and_is_not_in_it(client: OpenAI) -> None:
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 24}, stop=[" "])
    assert answer.choices[0].finish_reason == "stop"
    assert " " not in (answer.choices[0].message.content or "")


def test_log_probabilities_come_with_each_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 3}, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)


# tools and schemas


def test_a_forced_tool_is_called_with_arguments_of_its_schema(client: OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 64}, tools=[WEATHER], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_required_tool_call_streams_in_pieces_that_make_one(client: OpenAI) -> None:
    ask = {**ASK, "max_tokens": 64}
    name, arguments, ends = "", "", []
    for chunk in client.chat.completions.create(**ask, tools=[WEATHER], tool_choice="required", stream=True):
        for choice in chunk.choices:
            ends.append(choice.finish_reason)
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert (name, ends[-1]) == ("get_weather", "tool_calls")
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")


def test_the_async_client_calls_tools_and_keeps_to_schemas_whole_and_streamed(site: Site) -> None:
    async def calls(client: AsyncOpenAI, stream: bool) -> str:
        ask = {**ASK, "max_tokens": 64, "tools": [WEATHER], "tool_choice": "required"}
        if not stream:
            answer = await client.chat.completions.create(**ask)
            (call,) = answer.choices[0].message.tool_calls or []
            assert call.type == "function"
            return call.function.arguments
        deltas = [chunk.choices[0].delta async for chunk in await client.chat.completions.create(**ask, stream=True)]
        pieces = [call.function for delta in deltas for call in delta.tool_calls or ()]
        return "".join(piece.arguments or "" for piece in pieces if piece is not None)

    async def answers(client: AsyncOpenAI, stream: bool) -> str:
        ask = {**ASK, "max_tokens": 48, "response_format": COLOUR}
        if not stream:
            return (await client.chat.completions.create(**ask)).choices[0].message.content or ""
        chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def scenario() -> list[str]:
        async with AsyncOpenAI(base_url=site.base_url, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(do(client, stream) for do in (calls, answers) for stream in (False, True)))

    *cities, whole, streamed = map(json.loads, asyncio.run(scenario()))
    assert all(city["city"] in ("Oslo", "Rome") for city in cities)
    assert all(colour["colour"] in ("red", "blue") for colour in (whole, streamed))


def test_the_answer_to_a_tool_call_goes_back_to_the_model(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        {"role": "user", "content": "How is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    assert client.chat.completions.create(**{**ASK, "messages": messages}, tools=[WEATHER]).choices[0].message.content


def test_a_schema_binds_the_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 48}, response_format=COLOUR)
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")


# errors


def test_an_unknown_model_is_not_found_and_the_nearest_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'smollm2'") as caught:
        client.chat.completions.create(**{**ASK, "model": "smollm"})
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context_length_exceeded", "1024 tokens"),
        ({"temperature": "hot"}, "invalid_request_error", "temperature"),
        ({"messages": "text"}, "invalid_request_error", "messages"),
        ({"model": "gemma"}, "wrong_task", "/v1/completions"),
    ],
    ids=["too long", "wrong type", "wrong messages", "no chat template"],
)
def test_a_bad_request_says_what_is_wrong(client: OpenAI, changes: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, **changes})
    assert caught.value.code == code
    assert words in caught.value.message


def test_a_chat_model_makes_no_embeddings(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="small", input="text")
    assert caught.value.code == "wrong_task"


def test_a_picture_for_a_model_without_eyes_is_refused(client: OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": [picture]}]})
    assert caught.value.code == "unsupported_modality"


# lists, ids, figures


def test_models_are_listed_with_what_clients_look_for(client: OpenAI) -> None:
    client.chat.completions.create(**ASK)
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert set(listed) == {"smollm2", "gemma"}
    small = listed["smollm2"]
    assert (small["status"], small["max_model_len"], small["aliases"]) == ({"value": "loaded"}, 1024, ["small"])
    assert "chat" in small["capabilities"]
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_a_request_keeps_its_id_through_every_part(site: Site) -> None:
    mine = {"x-request-id": "sdk-test-1"}
    raw = site.client.chat.completions.with_raw_response.create(**ASK, extra_headers=mine)
    assert raw.headers["x-request-id"] == "sdk-test-1"
    for daemon in (site.gateway, site.node):
        line = daemon.wait_for(10.0, event="request", request_id="sdk-test-1")
        assert (line["status"], line["completion_tokens"] > 0) == (200, True)


def test_every_request_is_metered(site: Site) -> None:
    before = site.metric("cortex_tokens_total", model="smollm2", direction="completion")
    usage = site.client.chat.completions.create(**ASK).usage
    assert usage is not None
    list(site.client.chat.completions.create(**ASK, stream=True))
    after = site.metric("cortex_tokens_total", model="smollm2", direction="completion")
    assert after - before == 2 * usage.completion_tokens
    assert site.metric("cortex_inflight_requests") == 0
    assert site.metric("cortex_model_load_seconds_count", model="smollm2", node="local") >= 1


# those who leave


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_who_leaves_a_stream_gives_its_seat_back(site: Site, phase: str) -> None:
    long = "word " * (900 if phase == "prefill" else 3)
    ask = {**ASK, "messages": [{"role": "user", "content": long}], "max_tokens": 100, "logit_bias": {"2": -100}}
    stream = site.client.chat.completions.create(**ask, stream=True)
    if phase == "decode":
        next(iter(stream))
    stream.close()
    left = time.monotonic()
    while True:
        (info,) = [m for m in site.node.http.get("/models").json() if m["id"] == "smollm2"]
        if not info["active_requests"]:
            break
        assert time.monotonic() - left < 10, "the seat is still taken"
        time.sleep(0.05)
    site.gateway.wait_for(10.0, event="request", client_gone=True)
