"""Ollama's API on a real `cortex serve` before fake neurons: streams, loads, faults, listings and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import msgspec
from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, Gateway, cortex
from tests.helpers.serving_neuron import WORDS, ServingNeuron

TEXT = "".join(WORDS)
ALIASES = '[[models]]\nid = "m"\nttl_s = 600\n[aliases]\n"small" = "m"\n'


@asynccontextmanager
async def fleet(folder: Path, *nodes: ServingNeuron, status: str = "loaded", **said: Any) -> AsyncIterator[Gateway]:
    said = {"capabilities": ["chat"], "limits": {"context": 4096, "slots": 4}, **said}
    for node in nodes:
        node.put("m", status, tell=False, **said)
    async with neurons(*nodes):
        named = {f"n{number}": node.url for number, node in enumerate(nodes)}
        async with cortex(folder, named, toml=SETTINGS, models=ALIASES) as gateway:
            await gateway.until_up(*named)
            yield gateway


def chatting(**fields: Any) -> dict[str, Any]:
    return {"model": "m:latest", "messages": [{"role": "user", "content": "Hi"}], **fields}


def head_of(url: str) -> int:
    """What Ollama's own command asks first."""
    with urlopen(Request(url, method="HEAD")) as answer:
        status: int = answer.status
        return status


def lines(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n")
    return [msgspec.json.decode(line) for line in body.splitlines()]


def test_a_chat_streams_lines_unless_it_says_otherwise_and_both_are_counted(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            answer = await gateway.post("/api/chat", chatting(keep_alive="5m", options={"num_gpu": 1}))
            assert answer.headers["content-type"] == "application/x-ndjson"
            assert answer.headers["x-helexa-dropped"] == "keep_alive, options.num_gpu"
            *pieces, last = lines(answer.body)
            assert "".join(piece["message"]["content"] for piece in pieces) == TEXT
            assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", len(WORDS))
            assert {line["model"] for line in [*pieces, last]} == {"m:latest"}
            whole = await gateway.post("/api/generate", {"model": "small", "prompt": "Hi", "stream": False})
            assert whole.headers["content-type"] == "application/json"
            assert (whole.json()["response"], whole.json()["done"]) == (TEXT, True)
            await gateway.line(stream=False)
            found = await gateway.samples()
            assert found['cortex_tokens_total{direction="completion",model="m",node="n0"}'] == 2 * len(WORDS)
            assert found['cortex_time_to_first_token_seconds_count{model="m",node="n0"}'] == 2
            assert found['cortex_requests_total{endpoint="/api/chat",model="m",node="n0",status="200"}'] == 1

    run(scenario())
    assert [seen.path for seen in node.seen] == ["/v1/chat/completions"] * 2
    assert all(seen.body["stream"] and seen.body["model"] == "m" for seen in node.seen)


def test_a_node_is_asked_for_a_completion_where_no_template_is_wanted_or_there_is_none(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario(**said: Any) -> None:
        async with fleet(tmp_path, node, **said) as gateway:
            for more in ({"raw": True}, {}):
                await gateway.post("/api/generate", {"model": "m", "prompt": "Hi", **more})

    run(scenario())
    run(scenario(capabilities=[], task="completion"))
    assert [seen.path.rpartition("v1/")[2] for seen in node.seen] == [
        "completions",
        "chat/completions",
        "completions",
        "completions",
    ]


def test_a_request_without_a_prompt_loads_and_asks_for_no_token(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node, status="unloaded") as gateway:
            gone = await gateway.post("/api/generate", {"model": "m", "keep_alive": 0})
            assert (gone.json()["done"], gone.headers["x-helexa-dropped"]) == (True, "keep_alive")
            assert (await gateway.get("/api/ps")).json()["models"] == []
            loaded = await gateway.post("/api/generate", {"model": "m"})
            assert (loaded.json()["done_reason"], loaded.json()["response"]) == ("load", "")
            (one,) = (await gateway.get("/api/ps")).json()["models"]
            assert one["model"] == "m"
            chat = await gateway.post("/api/chat", {"model": "m", "stream": False})
            assert chat.json()["message"] == {"role": "assistant", "content": ""}

    run(scenario())
    assert node.seen == []


def test_faults_are_told_before_the_first_line_by_a_status_and_after_it_by_a_line(tmp_path: Path) -> None:
    node = ServingNeuron()
    complaint = node.refuses(400, code="invalid_request_error", message="`stop` is wrong.", param="stop")
    node.plan.extend([complaint, node.dies_after_two_words, *[node.dead] * 3])

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            for body, status, words in (
                (chatting(model="nobody"), 404, "no model is called"),
                (chatting(options={"num_ctx": 5000}), 400, "context of 4096"),
                (chatting(think="hard"), 400, "`think`"),
                (b"{", 400, "not valid JSON"),
            ):
                said = await gateway.post("/api/chat", body)
                assert (said.status, said.headers["content-type"]) == (status, "application/json")
                assert words in said.json()["error"]
            refused = await gateway.post("/api/chat", chatting())
            assert (refused.status, refused.json()["error"]) == (400, "`options.stop` is wrong.")
            broken = lines((await gateway.post("/api/chat", chatting())).body)
            assert [line.get("done") for line in broken] == [False, False, None]
            assert "n0" in broken[-1]["error"]
            dead = await gateway.post("/api/chat", chatting())
            assert dead.status == 502
            assert "error" in dead.json()

    run(scenario())


def test_listings_come_from_the_view_and_what_is_a_node_s_affair_says_where(tmp_path: Path) -> None:
    said = {"architecture": "llama", "quant": "Q4_K_M", "vram_used_mb": 300, "size_bytes": 1 << 20}

    async def scenario() -> None:
        async with fleet(tmp_path, ServingNeuron(), **said) as gateway:
            (listed,) = (await gateway.get("/api/tags")).json()["models"]
            assert (listed["model"], listed["size"], listed["details"]["family"]) == ("m", 1 << 20, "llama")
            (running,) = (await gateway.get("/api/ps")).json()["models"]
            assert (running["size"], running["context_length"]) == (300 << 20, 4096)
            assert running["expires_at"] < "2318"  # its ttl_s
            for name in ({"model": "small"}, {"name": "m:latest"}):
                shown = (await gateway.post("/api/show", name)).json()
                assert shown["model_info"]["llama.context_length"] == 4096
            assert (await gateway.post("/api/show", {})).json()["error"].startswith("`model` is missing")
            assert (await gateway.get("/api/version")).json()["version"].count(".") == 2
            for method, path, words in (
                ("POST", "/api/pull", "neuron pull"),
                ("POST", "/api/push", "cortex models"),
                ("POST", "/api/create", "models.toml"),
                ("POST", "/api/copy", "[aliases]"),
                ("DELETE", "/api/delete", "neuron rm"),
                ("POST", "/api/blobs/sha256:0", "models_dir"),
            ):
                answer = await gateway.api.fetch(method, path, b"{}")
                assert (answer.status, words in answer.json()["error"]) == (501, True), path
            assert await asyncio.to_thread(head_of, gateway.daemon.url) == 200

    run(scenario())
