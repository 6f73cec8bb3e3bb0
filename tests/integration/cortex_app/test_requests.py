"""A real `cortex serve` between a client and fake neurons: the table of errors, faults in every phase, and the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers.aio import run
from tests.helpers.fake_neuron import neurons
from tests.helpers.gateway import SETTINGS, Gateway, asking, cortex
from tests.helpers.serving_neuron import WORDS, ServingNeuron

from helexa.core import sse

TEXT = "".join(WORDS)
SHORT_STALL = SETTINGS + "[timeouts]\nstall_s = 1.0\n"


@asynccontextmanager
async def fleet(
    folder: Path, *nodes: ServingNeuron, toml: str = SETTINGS, models: str = "", status: str = "loaded", **fields: Any
) -> AsyncIterator[Gateway]:
    """Each node holds the model "m"; the gateway has seen them all."""
    for node in nodes:
        node.put("m", status, tell=False, capabilities=["chat"], **fields)
    async with neurons(*nodes):
        named = {f"n{number}": node.url for number, node in enumerate(nodes)}
        async with cortex(folder, named, toml=toml, models=models) as gateway:
            await gateway.until_up(*named)
            yield gateway


async def streamed(gateway: Gateway, model: str = "m", **fields: Any) -> tuple[dict[str, str], list[sse.Event]]:
    """Headers and all events of a stream, to its end."""
    body = msgspec.json.encode(asking(model, stream=True, **fields))
    reader, events = sse.EventReader(), []
    async with gateway.api.stream("POST", "/v1/chat/completions", body) as answer:
        assert answer.status == 200
        async for part in answer:
            events += reader.feed(part)
        return answer.headers, events


def text_of(events: list[sse.Event]) -> str:
    chunks = [msgspec.json.decode(e.data) for e in events if not e.comment and e.data != b"[DONE]"]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk.get("choices", ()))


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = msgspec.json.decode(body)["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return error


# answers


def test_an_answer_and_a_stream_pass_through(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, ServingNeuron()) as gateway:
            answer = await gateway.chat("m")
            assert answer.json()["choices"][0]["message"]["content"] == TEXT
            headers, events = await streamed(gateway)
            assert headers["content-type"].startswith("text/event-stream")
            assert (text_of(events), events[-1].data) == (TEXT, b"[DONE]")
            line = await gateway.line(stream=True)
            assert (line["status"], line["node"], line["completion_tokens"]) == (200, "n0", len(WORDS))

    run(scenario())


def test_a_node_gets_the_models_name_and_none_of_the_clients_secrets(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node, models='[[models]]\nid = "m"\n[aliases]\n"small" = "m"\n') as gateway:
            secret = {"authorization": "Bearer secret", "x-helexa-model": "another", "x-request-id": "mine-1"}
            answer = await gateway.chat("small", headers=secret)
            assert (answer.status, answer.headers["x-request-id"]) == (200, "mine-1")

    run(scenario())
    (seen,) = node.seen
    assert (seen.headers["x-helexa-model"], seen.headers["x-request-id"]) == ("m", "mine-1")
    assert "authorization" not in seen.headers
    assert seen.body["model"] == "small"  # the body is passed as it came


def test_usage_is_metered_whether_the_client_asked_or_not_and_told_only_to_those_who_did(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, ServingNeuron()) as gateway:
            _, silent = await streamed(gateway)
            _, told = await streamed(gateway, stream_options={"include_usage": True})
            assert not any(b'"usage"' in event.data for event in silent)
            assert any(b'"usage"' in event.data for event in told)
            await gateway.line(stream=True)
            found = await gateway.samples()
            assert found['cortex_tokens_total{direction="completion",model="m",node="n0"}'] == 2 * len(WORDS)
            assert found['cortex_time_to_first_token_seconds_count{model="m",node="n0"}'] == 2
            assert found['cortex_inflight_requests{model="m",node="n0"}'] == 0

    run(scenario())


# refusals


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"{", 400, "invalid_request_error", "not valid JSON"),
        (b'{"model": 5}', 400, "invalid_request_error", "model"),
        (b"{}", 400, "invalid_request_error", "model"),
        (b'{"model": "mm"}', 404, "model_not_found", "did you mean 'm'?"),
        (b'{"model": "m", "messages": "' + b"x" * (1 << 20) + b'"}', 413, "request_too_large", "1 MB"),
    ],
    ids=["not JSON", "wrong type", "no model", "unknown model", "too large"],
)
def test_what_is_wrong_with_a_request_is_told(tmp_path: Path, body: bytes, status: int, code: str, words: str) -> None:
    async def scenario() -> None:
        async with fleet(tmp_path, ServingNeuron()) as gateway:
            answer = await gateway.post("/v1/chat/completions", body)
            error = error_of(answer.body)
            assert (answer.status, error["code"]) == (status, code)
            assert words in error["message"]
            assert answer.headers["x-request-id"]

    run(scenario())


def test_another_task_than_the_models_is_refused_without_asking_the_node(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            answer = await gateway.post("/v1/embeddings", {"model": "m", "input": "x"})
            assert (answer.status, error_of(answer.body)["code"]) == (400, "wrong_task")

    run(scenario())
    assert node.seen == []


def test_a_nodes_own_refusal_reaches_the_client_byte_for_byte(tmp_path: Path) -> None:
    node = ServingNeuron()
    said = {"code": "context_length_exceeded", "message": "maximum context length is 8 tokens", "n_ctx": 8}
    node.plan.append(node.refuses(400, **said))

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            answer = await gateway.chat("m")
            assert answer.status == 400
            assert msgspec.json.decode(answer.body) == {"error": {"type": "server_error", "param": None, **said}}
            line = await gateway.line(status=400)
            assert (line["node"], line["error"], line["message"]) == ("n0", said["code"], said["message"])

    run(scenario())


def test_without_a_node_there_is_a_503_that_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cortex(tmp_path, {"n0": "http://127.0.0.1:9"}, models='[[models]]\nid = "m"\n') as gateway:
            for model in ("m", "whatever"):
                answer = await gateway.chat(model)
                error = error_of(answer.body)
                assert (answer.status, error["code"]) == (503, "no_node")
                assert "n0" in error["message"]
                assert int(answer.headers["retry-after"]) > 0

    run(scenario())


# loads


def test_a_known_model_is_loaded_and_then_served_with_heartbeats_meanwhile(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.load_may_end.clear()

    async def scenario() -> None:
        async with fleet(tmp_path, node, status="unloaded") as gateway:
            others = [asyncio.create_task(gateway.chat("m")) for _ in range(2)]
            body = msgspec.json.encode(asking("m", stream=True))
            reader, events = sse.EventReader(), []
            async with gateway.api.stream("POST", "/v1/chat/completions", body) as answer:
                async for part in answer:
                    events += reader.feed(part)
                    node.load_may_end.set()  # the first heartbeat is here
            assert events[0].comment
            assert events[0].data.startswith(b"loading m on n0")
            assert text_of(events) == TEXT
            assert [other.status for other in await asyncio.gather(*others)] == [200, 200]
            assert len(node.loads) == 1
            found = await gateway.samples()
            assert found['cortex_cold_starts_total{model="m"}'] == 1
            assert found['cortex_queue_wait_seconds_count{model="m"}'] == 3
            assert found['cortex_model_load_seconds_count{model="m",node="n0"}'] == 1

    run(scenario())


def test_an_alias_goes_to_the_next_of_its_models_where_the_first_cannot_be_had(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.put("tiny", "loaded", tell=False, capabilities=["chat"])
    node.load_failure = "the file is cut short at byte 4711"

    async def scenario() -> None:
        aliases = '[aliases]\nsmart = ["m", "tiny"]\n"claude-*" = "smart"\n'
        async with fleet(tmp_path, node, models='[[models]]\nid = "m"\n' + aliases, status="unloaded") as gateway:
            for path, name in (("/v1/chat/completions", "smart"), ("/v1/messages", "claude-opus-4")):
                answer = await gateway.post(path, asking(name, max_tokens=9))
                assert (answer.status, answer.headers["x-helexa-model"]) == (200, "tiny")
            assert len(node.loads) == 1  # the second request did not wait for what had just failed
            assert [seen.headers["x-helexa-model"] for seen in node.seen] == ["tiny", "tiny"]
            listed = (await gateway.get("/v1/models/claude-x")).json()
            assert (listed["id"], listed["aliases"]) == ("m", ["claude-*", "smart"])

    run(scenario())


def test_what_is_over_a_models_limits_waits_its_turn_or_is_told_to_come_again(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        models = '[[models]]\nid = "m"\nlimits = { running = 1, waiting = 1 }\n'
        async with fleet(tmp_path, node, models=models) as gateway:
            first = asyncio.create_task(streamed(gateway))
            await node.arrived.wait()
            others = [asyncio.create_task(gateway.chat("m")) for _ in range(2)]
            [refused], [waiting] = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            answer = refused.result()
            error = error_of(answer.body)
            assert (answer.status, error["code"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            claude = await gateway.post("/v1/messages", asking("m", max_tokens=9))
            assert (claude.status, claude.json()["error"]["type"]) == (529, "overloaded_error")
            assert len(node.seen) == 1
            node.go_on.set()
            assert text_of((await first)[1]) == TEXT
            assert (await waiting).status == 200

    run(scenario())


@pytest.mark.parametrize(("tokens", "status"), [(2049, 400), (2048, 200), (None, 200)])
def test_a_prompt_that_cannot_fit_is_refused_before_a_load_and_only_if_a_node_has_counted_it(
    tmp_path: Path, tokens: int | None, status: int
) -> None:
    node = ServingNeuron()
    node.tokens = tokens

    async def scenario() -> None:
        models = '[[models]]\nid = "m"\ncontext = 2000\n'
        async with fleet(tmp_path, node, models=models, status="unloaded") as gateway:
            messages = [{"role": "user", "content": "x" * 5000}]
            answer = await gateway.post("/v1/chat/completions", {"model": "m", "messages": messages})
            assert answer.status == status
            assert node.counted[0].body["profile"]["context"] == 2000
            if status == 400:
                error = error_of(answer.body)
                assert (error["code"], error["n_prompt_tokens"], error["n_ctx"]) == (
                    "context_length_exceeded", 2049, 2048,
                )  # fmt: skip
                claude = await gateway.post("/v1/messages", {"model": "m", "max_tokens": 9, "messages": messages})
                assert claude.json()["error"]["message"] == "prompt is too long: 2049 tokens > 2048 maximum"
                assert node.loads == []
            assert (await gateway.chat("m")).status == 200  # a short one is not even counted
            assert len(node.counted) == (2 if status == 400 else 1)

    run(scenario())


def test_a_failed_load_is_told_with_the_nodes_reason(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.load_failure = "the file is cut short at byte 4711"

    async def scenario() -> None:
        async with fleet(tmp_path, node, status="unloaded") as gateway:
            answer = await gateway.chat("m")
            error = error_of(answer.body)
            assert (answer.status, error["code"]) == (503, "load_failed")
            assert "cut short at byte 4711" in error["message"]
            assert "retry-after" in answer.headers

    run(scenario())


def test_where_no_node_has_room_in_time_the_503_says_what_is_in_the_way(tmp_path: Path) -> None:
    node = ServingNeuron(memory_mb=1000)
    node.needs_mb["m"] = 600
    node.put("busy", "loaded", tell=False, vram_used_mb=900, active_requests=1)
    toml = SETTINGS + "[loading]\nwait_s = 0.5\n"

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=toml, status="unloaded") as gateway:
            answer = await gateway.chat("m")
            error = error_of(answer.body)
            assert (answer.status, error["code"]) == (503, "overloaded")
            assert (
                "needs 600 MB (weights 600, KV cache 0, overhead 0) and has 100 MB free; busy is in use (1 request)"
                in error["message"]
            )

    run(scenario())


def test_what_can_never_fit_is_refused_at_once_with_the_figures(tmp_path: Path) -> None:
    node = ServingNeuron(memory_mb=1000)
    node.needs_mb["m"] = 4000

    async def scenario() -> None:
        async with fleet(tmp_path, node, status="unloaded") as gateway:
            answer = await gateway.chat("m")
            error = error_of(answer.body)
            assert (answer.status, error["code"]) == (404, "model_not_servable")
            assert "needs 4,000 MB (estimate: weights 4,000, KV cache 0, overhead 0), and has 1,000" in error["message"]

    run(scenario())


# faults


def test_a_node_that_dies_before_its_first_byte_is_replaced_by_another(tmp_path: Path) -> None:
    first, second = ServingNeuron(), ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, first, second) as gateway:
            for node in (first, second):
                node.plan.extend([node.dead] * 4)  # the silent second try on a reused connection is one of them
            second.plan.clear()
            answers = [await gateway.chat("m") for _ in range(6)]
            assert [answer.status for answer in answers] == [200] * 6
            assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {TEXT}

    run(scenario())
    assert second.seen


def test_a_node_that_refuses_for_now_is_replaced_by_another(tmp_path: Path) -> None:
    first, second = ServingNeuron(), ServingNeuron()
    full = first.refuses(503, code="overloaded", message="no seat is free")

    async def scenario() -> None:
        async with fleet(tmp_path, first, second) as gateway:
            first.plan.extend([full] * 8)
            for _ in range(4):
                assert (await gateway.chat("m")).status == 200
            second.plan.extend([full] * 8)
            answer = await gateway.chat("m")
            assert (answer.status, answer.headers["retry-after"]) == (503, "7")
            assert error_of(answer.body)["message"] == "no seat is free"

    run(scenario())


def test_when_every_node_dies_under_it_the_client_gets_a_502(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            node.plan.extend([node.dead] * 6)
            answer = await gateway.chat("m")
            assert (answer.status, error_of(answer.body)["code"]) == (502, "upstream_error")
            found = await gateway.samples()
            assert found['cortex_upstream_errors_total{kind="connect",node="n0"}'] >= 1

    run(scenario())


def test_a_node_that_dies_mid_stream_ends_it_with_an_error_and_never_done(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.dies_after_two_words)

    async def scenario() -> None:
        async with fleet(tmp_path, node, ServingNeuron()) as gateway:
            while not node.seen:
                _, events = await streamed(gateway)
            assert error_of(events[-1].data)["code"] == "upstream_error"
            assert text_of(events[:-1]) == "Hello"
            assert not any(event.data == b"[DONE]" for event in events)
            assert (await gateway.line(status=502))["stream"] is True

    run(scenario())


def test_a_stalled_node_is_a_504_or_an_error_event(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SHORT_STALL) as gateway:
            node.plan.append(node.silent)
            answer = await gateway.chat("m")
            assert (answer.status, error_of(answer.body)["code"]) == (504, "upstream_timeout")
            await asyncio.wait_for(node.left.wait(), 5)
            node.plan.append(node.paused)
            _, events = await streamed(gateway)
            assert error_of(events[-1].data)["code"] == "upstream_timeout"
            assert not any(event.data == b"[DONE]" for event in events)

    run(scenario())


def test_a_slow_answer_is_no_stall_while_its_node_reports_the_model_at_work(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SHORT_STALL, active_requests=1) as gateway:
            asked = asyncio.create_task(streamed(gateway))
            await asyncio.wait([asked], timeout=3.5)  # more than three times stall_s
            node.go_on.set()
            _, events = await asked
            assert (text_of(events), events[-1].data) == (TEXT, b"[DONE]")

    run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_generation_with_it(tmp_path: Path, stream: bool) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            node.plan.append(node.paused if stream else node.silent)
            asked = asyncio.create_task(gateway.chat("m", stream=stream))
            await node.arrived.wait()
            asked.cancel()
            await asyncio.wait_for(node.left.wait(), 1.5)
            line = await gateway.line(client_gone=True)
            assert (line["status"], line["node"]) == (499, "n0")

    run(scenario())


# the end


def test_sigterm_lets_running_requests_finish_and_tells_new_ones(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            running = asyncio.create_task(streamed(gateway))
            await node.arrived.wait()
            ending = asyncio.create_task(gateway.stop())
            await asyncio.to_thread(gateway.daemon.wait_for, event="shutting down")
            answer = await gateway.chat("m")
            assert (answer.status, error_of(answer.body)["code"]) == (503, "shutting_down")
            assert "retry-after" in answer.headers
            assert (await gateway.get("/health")).json()["status"] == "draining"
            assert (await gateway.get("/ready")).status == 503
            node.go_on.set()
            _, events = await running
            assert events[-1].data == b"[DONE]"
            assert await ending == 0

    run(scenario())


def test_sigterm_refuses_those_who_wait_for_a_load_at_once(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.load_may_end.clear()

    async def scenario() -> None:
        async with fleet(tmp_path, node, status="unloaded") as gateway:
            waiting = asyncio.create_task(gateway.chat("m"))
            await node.until_asked("/models/load")
            began = time.monotonic()
            assert await gateway.stop() == 0
            assert time.monotonic() - began < 3
            answer = await waiting
            assert (answer.status, error_of(answer.body)["code"]) == (503, "shutting_down")

    run(scenario())


def test_a_drain_is_bounded(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SETTINGS.replace("drain_s = 5", "drain_s = 0.3")) as gateway:
            running = asyncio.create_task(streamed(gateway))
            await node.arrived.wait()
            assert await gateway.stop() == 0
            _, events = await running
            assert error_of(events[-1].data)["code"] == "shutting_down"

    run(scenario())
