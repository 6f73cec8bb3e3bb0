"""The ollama package against a real gateway, node and model; what it reads is held strictly to its own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import ollama
import pytest
from ollama import AsyncClient, Client, ResponseError
from tests.helpers.aio import run
from tests.helpers.gateway import cortex_process
from tests.helpers.models import gemma, smollm2
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.strictly import strictly

MODEL = "smollm2"
CONTEXT = 1024
CATALOGUE = f"""
[[models]]
id = "{MODEL}"
source = "{smollm2()}"
context = {CONTEXT}
slots = 2
threads = 1

[[models]]
id = "gemma"
source = "{gemma()}"
context = 512
slots = 1
threads = 1
"""
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Name a colour."}]
OPTIONS = {"temperature": 0, "num_predict": 12, "num_ctx": CONTEXT}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["colour"],
}

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Site:
    gateway: Daemon
    client: Client

    def lines(self, path: str, **body: Any) -> list[dict[str, Any]]:
        answer = httpx.post(self.gateway.url + path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ollama")
    (folder / "node").mkdir()
    with (
        neuron(folder / "node") as node,
        cortex_process(folder, {"one": node.url}, models=CATALOGUE) as gateway,
    ):
        gateway.wait_for(event="node is up")
        with Client(gateway.url, timeout=120) as client:
            yield Site(gateway, client)


@pytest.fixture
def client(site: Site) -> Client:
    return site.client


def test_an_empty_prompt_loads_the_model_and_it_is_listed_as_running(client: Client) -> None:
    assert client.ps().models == []
    answer = client.generate(MODEL)
    assert (answer.done, answer.done_reason, answer.response) == (True, "load", "")
    (running,) = client.ps().models
    assert (running.model, running.context_length, running.size_vram) == (MODEL, CONTEXT, 0)  # a CPU's memory
    assert running.size is not None
    assert running.size > 10 << 20
    assert running.expires_at is not None


def test_a_stream_says_what_the_whole_answer_says_and_both_are_strictly_of_the_package_s_types(site: Site) -> None:
    whole = site.client.chat(MODEL, MESSAGES, options=OPTIONS)
    assert whole.message.content
    stream = list(site.client.chat(f"{MODEL}:latest", MESSAGES, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in stream) == whole.message.content
    last = stream[-1]
    assert last.done
    assert last.done_reason == whole.done_reason
    assert last.model == f"{MODEL}:latest"
    assert last.prompt_eval_count == whole.prompt_eval_count
    for count in (last.eval_count, last.eval_duration, last.prompt_eval_duration, last.total_duration):
        assert count is not None
        assert count > 0
    assert (last.eval_count or 0) <= 12
    for line in site.lines("/api/chat", model=MODEL, messages=MESSAGES, options=OPTIONS):
        strictly(ollama.ChatResponse, line)
    for line in site.lines("/api/generate", model=MODEL, prompt="Hi", options=OPTIONS):
        strictly(ollama.GenerateResponse, line)


def test_generate_is_the_chat_of_one_prompt(client: Client) -> None:
    system = {"role": "system", "content": "You are brief."}
    chat = client.chat(MODEL, [system, *MESSAGES], options=OPTIONS)
    generated = client.generate(MODEL, "Name a colour.", system="You are brief.", options=OPTIONS)
    assert generated.response == chat.message.content
    assert generated.prompt_eval_count == chat.prompt_eval_count


def test_a_raw_prompt_goes_past_the_template_and_a_model_without_one_takes_no_other(client: Client) -> None:
    raw = client.generate(MODEL, "The sea is", raw=True, options=OPTIONS)
    templated = client.generate(MODEL, "The sea is", options=OPTIONS)
    assert raw.response
    assert (raw.prompt_eval_count or 0) < (templated.prompt_eval_count or 0)
    completed = client.generate("gemma", "The sea is", options=OPTIONS | {"num_ctx": 512})
    assert completed.response
    streamed = client.generate("gemma", "The sea is", options=OPTIONS | {"num_ctx": 512}, stream=True)
    assert "".join(part.response or "" for part in streamed) == completed.response
    with pytest.raises(ResponseError, match="`system` needs a chat template"):
        client.generate("gemma", "The sea is", system="You are brief.")


def test_the_options_have_their_effect(client: Client) -> None:
    hot = OPTIONS | {"temperature": 1.0, "seed": 7, "top_k": 50, "repeat_penalty": 1.1, "mirostat": 0}
    first, second = (client.chat(MODEL, MESSAGES, options=hot).message.content for _ in range(2))
    assert first == second
    cut = client.chat(MODEL, MESSAGES, options=OPTIONS | {"num_predict": 2})
    assert (cut.done_reason, cut.eval_count) == ("length", 2)
    stopped = client.chat(MODEL, MESSAGES, options=OPTIONS | {"num_predict": 24, "stop": [" "]})
    assert stopped.done_reason == "stop"
    assert " " not in (stopped.message.content or "")


def test_a_format_binds_the_answer(client: Client) -> None:
    options = OPTIONS | {"num_predict": 48}
    told = client.chat(MODEL, MESSAGES, format=COLOUR, options=options).message.content or ""
    assert json.loads(told)["colour"] in ("red", "blue")
    assert json.loads(client.generate(MODEL, "Name a colour.", format=COLOUR, options=options).response or "")


def test_a_call_has_its_arguments_as_an_object_and_its_result_goes_back(client: Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "Sunny."},
    ]
    assert client.chat(MODEL, messages, tools=[WEATHER], options=OPTIONS).message.content


def test_log_probabilities_come_with_each_piece(client: Client) -> None:
    answer = client.chat(MODEL, MESSAGES, options=OPTIONS | {"num_predict": 3}, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 3
    assert all(token.logprob <= 0 and len(token.top_logprobs or ()) == 2 for token in answer.logprobs)


def test_the_async_client_streams_too(site: Site) -> None:
    async def scenario() -> list[str]:
        client = AsyncClient(site.gateway.url, timeout=60)
        try:
            parts = [part async for part in await client.chat(MODEL, MESSAGES, options=OPTIONS, stream=True)]
        finally:
            await client.close()
        return [part.message.content or "" for part in parts]

    assert "".join(run(scenario()))


def test_models_are_listed_and_shown(site: Site) -> None:
    client = site.client
    assert {model.model for model in client.list().models} == {MODEL, "gemma"}
    shown = client.show(MODEL)
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == CONTEXT
    assert shown.details is not None
    assert (shown.details.family, shown.details.format) == ("llama", "gguf")
    url = site.gateway.url
    beside = {"models.name", "models.capabilities"}
    strictly(ollama.ListResponse, httpx.get(f"{url}/api/tags").json(), beside=beside)
    strictly(ollama.ProcessResponse, httpx.get(f"{url}/api/ps").json())
    strictly(ollama.ShowResponse, httpx.post(f"{url}/api/show", json={"name": MODEL}).json())
    assert httpx.head(url).status_code == 200


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"options": {"num_ctx": 4096}}, 400, "context of 1024 tokens"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "1024 tokens"),
        ({"model": "smollm"}, 404, "did you mean 'smollm2'"),
        ({"model": "gemma"}, 400, "chat"),
    ],
    ids=["context", "too long", "unknown", "no template"],
)
def test_a_refusal_is_the_package_s_own_error(client: Client, more: dict[str, Any], status: int, words: str) -> None:
    with pytest.raises(ResponseError) as refused:
        client.chat(**{"model": MODEL, "messages": MESSAGES, **more})
    assert refused.value.status_code == status
    assert words in refused.value.error


def test_models_are_not_pulled_from_here(client: Client) -> None:
    with pytest.raises(ResponseError, match="neuron pull") as refused:
        client.pull("llama3")
    assert refused.value.status_code == 501
    with pytest.raises(ResponseError, match="neuron rm"):
        client.delete(MODEL)
