"""Model files of every kind and state, as a client of the gateway meets them: what serves, and why what does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import OpenAI
from tests.helpers import tiny_gguf
from tests.helpers.gateway import PATIENT, cortex_process
from tests.helpers.models import gemma, smollm2
from tests.helpers.neuron_daemon import Daemon, neuron

CATALOGUE = """
[[models]]
id = "smollm2"
source = "{smollm2}"
context = 1024
slots = 1
threads = 1

[[models]]
id = "gemma-chat"
source = "{gemma}"
context = 512
slots = 1
threads = 1
chat_template = "{{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}"

[[models]]
id = "embed"
source = "{folder}/embed.gguf"

[[models]]
id = "rerank"
source = "{folder}/rerank.gguf"

[[models]]
id = "cut"
source = "{folder}/cut.gguf"

[[models]]
id = "lie"
source = "{folder}/lie.gguf"

[[models]]
id = "text"
source = "{folder}/text.gguf"

[[models]]
id = "absent"
source = "{folder}/absent.gguf"

[[models]]
id = "too-much"
source = "{smollm2}"
context = 8192
slots = 256

[[models]]
id = "beyond"
source = "{smollm2}"
context = 1000000
"""
LIMIT_MB = 1500
HELLO: Any = [{"role": "user", "content": "Hello"}]

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Site:
    node: Daemon
    gateway: Daemon
    client: OpenAI


@pytest.fixture(scope="module", params=["process", "none"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("files")
    tiny_gguf.embedding_model(folder / "embed.gguf")
    tiny_gguf.rerank_model(folder / "rerank.gguf")
    with smollm2().open("rb") as whole:
        (folder / "cut.gguf").write_bytes(whole.read(60 << 20))
    (folder / "lie.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    (folder / "text.gguf").write_bytes(b"not a model at all" * 99)
    models = CATALOGUE.format(smollm2=smollm2(), gemma=gemma(), folder=folder)
    settings = f'isolation = "{request.param}"\nmemory_limit_mb = [{LIMIT_MB}]'
    with (
        neuron(folder, settings) as node,
        cortex_process(folder, {"beast": node.url}, toml=PATIENT, models=models) as gateway,
    ):
        gateway.wait_for(event="node is up")
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield Site(node, gateway, client)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("cut", ["cut.gguf", "needs 98362432 bytes, the file has 62914560", "download it again"]),
        ("lie", ["lie.gguf", "header claims", "damaged"]),
        ("text", ["text.gguf is not a GGUF file"]),
        ("absent", ["absent.gguf is not there"]),
        ("too-much", ["needs 46,857 MB", f"{LIMIT_MB:,} MB"]),
        ("beyond", ["context = 1000000", "8192"]),
    ],
)
def test_what_can_never_load_is_refused_with_the_nodes_reason(
    site: Site, model: str, words: list[str], stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        site.client.chat.completions.create(model=model, messages=HELLO, stream=stream)
    assert caught.value.code == "model_not_servable"
    assert "beast" in caught.value.message
    for word in words:
        assert word in caught.value.message
    assert site.node.http.get("/health").json()["status"] == "ok"
    assert site.gateway.http.get("/ready").status == 200
    answer = site.client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=2)
    assert answer.choices[0].message.content


def test_a_template_of_the_profile_lets_a_model_without_one_chat(site: Site) -> None:
    whole = site.client.chat.completions.create(model="gemma-chat", messages=HELLO, max_tokens=4, temperature=0)
    assert whole.choices[0].message.content
    parts = list(
        site.client.chat.completions.create(
            model="gemma-chat", messages=HELLO, max_tokens=4, temperature=0, stream=True
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content


def test_embeddings_are_the_same_in_numbers_and_in_base64(site: Site) -> None:
    texts = ["hello there", "you"]
    by_the_sdk = site.client.embeddings.create(model="embed", input=texts)  # which asks for base64
    plain = site.client.embeddings.create(model="embed", input=texts, encoding_format="float")
    assert [item.index for item in by_the_sdk.data] == [0, 1]
    for one, other in zip(by_the_sdk.data, plain.data, strict=True):
        assert len(one.embedding) == 64
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.fsum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)
    assert by_the_sdk.data[0].embedding != by_the_sdk.data[1].embedding
    assert by_the_sdk.usage.prompt_tokens > 0


def test_an_input_longer_than_the_model_takes_is_told_both_figures(site: Site) -> None:
    with pytest.raises(openai.BadRequestError, match="512 tokens") as caught:
        site.client.embeddings.create(model="embed", input="hello " * 600)
    assert caught.value.code == "context_length_exceeded"


def test_documents_are_ranked(site: Site) -> None:
    asked = {"model": "rerank", "query": "a", "documents": ["a b", "c d", "e"]}
    answer = site.gateway.http.post("/v1/rerank", asked).json()
    assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    best = site.gateway.http.post("/v1/rerank", {**asked, "top_n": 1}).json()
    assert best["results"] == answer["results"][:1]


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/rerank", "embed"),
        ("/v1/embeddings", "rerank"),
        ("/v1/chat/completions", "embed"),
        ("/v1/rerank", "smollm2"),
    ],
)
def test_each_serves_its_own_task_only(site: Site, path: str, model: str) -> None:
    body = {"model": model, "query": "a", "documents": ["b"], "input": "a", "messages": HELLO}
    answer = site.gateway.http.post(path, body)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "wrong_task")
