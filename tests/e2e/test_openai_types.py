"""What the gateway answers on OpenAI's paths, held strictly to the types that its SDK generates from the published
description: every answer and every event, and each member beside them named."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.helpers.gateway import cortex_process
from tests.helpers.models import smollm2
from tests.helpers.neuron_daemon import neuron
from tests.helpers.published import checked, published
from tests.helpers.strictly import strictly
from tests.helpers.tiny_gguf import embedding_model, rerank_model

from helexa.core import sse

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODELS = """
[[models]]
id = "smollm2"
source = "{smollm2}"
context = 1024
slots = 2
threads = 1

[[models]]
id = "embed"
source = "{folder}/embed.gguf"
capabilities = ["embed", "dimensions"]
context = 256
slots = 1
threads = 1

[[models]]
id = "rerank"
source = "{folder}/rerank.gguf"
context = 256
slots = 1
threads = 1
"""
ASK: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Name a colour."}],
    "temperature": 0,
    "max_tokens": 6,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
        },
    },
}
# Each request as a kind of answer that there is.
CHATS: dict[str, dict[str, Any]] = {
    "text": {},
    "choices": {"n": 2, "temperature": 1.0, "seed": 1},
    "stop": {"stop": [" "]},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "call": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 48},
    "developer": {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *ASK["messages"]]
    },
    "turns": {
        "messages": [
            *ASK["messages"],
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
        ],
        "tools": [TOOL],
    },
    "local": {
        "top_k": 20,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
        "seed": 3,
        "logit_bias": {"5": -1},
        "user": "u",
        "metadata": {"a": "b"},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "parallel_tool_calls": False,
        "max_completion_tokens": 4,
        "max_tokens": None,
    },
}
# What is sent beside OpenAI's types, documented in docs/reference/http.md.
TOKEN_IDS = {"choices.logprobs.content.id", "choices.logprobs.content.top_logprobs.id"}
BESIDE = {"choices.stop_reason", "timings", *TOKEN_IDS}
BESIDE_A_MODEL = {
    "status",
    "nodes",
    "aliases",
    "max_model_len",
    "meta",
    "capabilities",
    "architecture",
}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("types")
    (folder / "node").mkdir()
    embedding_model(folder / "embed.gguf")
    rerank_model(folder / "rerank.gguf")
    models = MODELS.format(smollm2=smollm2(), folder=folder)
    with neuron(folder / "node") as node, cortex_process(folder, {"one": node.url}, models=models) as gateway:
        gateway.wait_for(event="node is up")
        with httpx.Client(base_url=gateway.url, timeout=120, transport=checked("openai", httpx.Client)) as client:
            yield client


def test_the_published_description_is_there() -> None:
    """Where it is, everything that these tests and those of the SDKs get is held to it too."""
    published("openai")


def post(site: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = site.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def events(site: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = post(site, path, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, done = [event for event in sse.EventReader().feed(answer.content) if not event.comment]
    assert done.data == b"[DONE]"
    return [json.loads(event.data) for event in found]


@pytest.mark.parametrize("name", CHATS)
def test_each_chat_is_strictly_of_the_published_types_whole_and_streamed(site: httpx.Client, name: str) -> None:
    body = {**ASK, **CHATS[name]}
    whole = post(site, CHAT, body).json()
    strictly(ChatCompletion, whole, beside=BESIDE)
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    chunks = events(site, CHAT, body)
    for chunk in chunks:
        strictly(ChatCompletionChunk, chunk, beside=BESIDE)
        assert "usage" not in chunk or chunk["usage"] is None
    asked = events(site, CHAT, {**body, "stream_options": {"include_usage": True}})
    strictly(ChatCompletionChunk, asked[-1], beside=BESIDE)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk.get("usage") is None for chunk in asked[:-1])
    first = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["delta"].get("role")]
    assert sorted(first) == list(range(body.get("n", 1)))


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"n": 2, "prompt": ["a", "b"], "echo": True}, {"stop": " "}])
def test_each_completion_is_strictly_of_the_published_type(site: httpx.Client, more: dict[str, Any]) -> None:
    body = {"model": "smollm2", "prompt": "The sea is", "max_tokens": 4, **more}
    strictly(Completion, post(site, COMPLETIONS, body).json(), beside=BESIDE)
    for chunk in events(site, COMPLETIONS, {**body, "stream_options": {"include_usage": True}}):
        for choice in chunk["choices"]:
            # null until the last, as at OpenAI, whose description speaks of whole answers only
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(Completion, chunk, beside=BESIDE)


def test_embeddings_are_of_the_published_type_in_every_form(site: httpx.Client) -> None:
    one = post(site, "/v1/embeddings", {"model": "embed", "input": "a b", "user": "u"}).json()
    strictly(CreateEmbeddingResponse, one)
    vector = one["data"][0]["embedding"]
    several = post(site, "/v1/embeddings", {"model": "embed", "input": ["c", "a b"]}).json()
    strictly(CreateEmbeddingResponse, several)
    assert [entry["index"] for entry in several["data"]] == [0, 1]
    assert several["data"][1]["embedding"] == pytest.approx(vector, abs=1e-3)
    coded = post(site, "/v1/embeddings", {"model": "embed", "input": "a b", "encoding_format": "base64"}).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(vector, abs=1e-6)
    for tokens in ([5, 6, 7], [[5, 6, 7], [8]]):
        strictly(CreateEmbeddingResponse, post(site, "/v1/embeddings", {"model": "embed", "input": tokens}).json())
    for size in (len(vector), 16):
        asked = {"model": "embed", "input": "a b", "dimensions": size}
        cut = post(site, "/v1/embeddings", asked).json()
        strictly(CreateEmbeddingResponse, cut)
        assert len(cut["data"][0]["embedding"]) == size
        assert math.hypot(*cut["data"][0]["embedding"]) == pytest.approx(1, abs=1e-4)
    ollama = post(site, "/api/embed", {"model": "embed", "input": ["a b"], "dimensions": 16}).json()
    assert ollama["embeddings"][0] == pytest.approx(cut["data"][0]["embedding"], abs=1e-6)
    assert post(site, "/api/embeddings", {"model": "embed", "prompt": "a b"}).json()["embedding"] == pytest.approx(
        vector, abs=1e-6
    )


def test_rerank_has_the_shape_that_jina_and_cohere_share(site: httpx.Client) -> None:
    body = {"model": "rerank", "query": "a", "documents": ["b", {"text": "a"}, "c"], "top_n": 2, "priority": 1}
    answer = post(site, "/v1/rerank", {**body, "return_documents": True})
    assert answer.headers["x-helexa-dropped"] == "priority"
    found = answer.json()
    assert found["model"] == "rerank"
    assert len(found["results"]) == 2
    scores = [result["relevance_score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True)
    for result in found["results"]:
        assert result["document"]["text"] == ["b", "a", "c"][result["index"]]


def test_models_are_of_the_published_type_with_what_is_documented_beside_it(site: httpx.Client) -> None:
    listed = site.get("/v1/models").json()
    assert set(listed) == {"object", "data"}
    for entry in [*listed["data"], site.get("/v1/models/smollm2").json()]:
        strictly(Model, entry, beside=BESIDE_A_MODEL)


def test_what_is_not_done_is_named_on_a_stream_too(site: httpx.Client) -> None:
    answer = post(site, CHAT, {**ASK, "service_tier": "priority", "verbosity": "low", "stream": True})
    assert answer.headers["x-helexa-dropped"] == "service_tier, verbosity"
