"""POST /v1/messages on a real `cortex serve` before fake neurons: faults in every phase, told as Anthropic's clients
know them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers.aio import run
from tests.helpers.fleets_of_fakes import fleet
from tests.helpers.gateway import SETTINGS, Gateway
from tests.helpers.published import Said
from tests.helpers.serving_neuron import WORDS, ServingNeuron

from helexa.core import sse

TEXT = "".join(WORDS)
SAID = Said("anthropic", "/v1/messages")


@pytest.fixture(autouse=True)
def _is_as_published() -> Iterator[None]:
    yield
    SAID.hold()


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def streamed(gateway: Gateway, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
    reader, events = sse.EventReader(), []
    body = msgspec.json.encode(asking(stream=True, **fields))
    async with gateway.api.stream("POST", "/v1/messages?beta=true", body) as answer:
        async for part in answer:
            events += reader.feed(part)
    for event in events:
        assert event.name is not None, "every event has its name"
    told = [msgspec.json.decode(event.data) for event in events]
    for data in told:
        SAID.event(data)
    return answer.status, told


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events if event["type"] != "ping"]


def test_a_node_is_asked_for_a_stream_of_its_own_dialect_whatever_the_client_wants(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            whole = (await gateway.post("/v1/messages", asking())).json()
            assert whole["content"] == [{"type": "text", "text": TEXT}]
            assert whole["usage"]["input_tokens"] == 7
            _, events = await streamed(gateway)
            assert kinds(events)[-1] == "message_stop"
            await gateway.line(stream=True)
            found = await gateway.samples()
            assert found['cortex_tokens_total{direction="completion",model="m",node="n0"}'] == 2 * len(WORDS)
            assert found['cortex_time_to_first_token_seconds_count{model="m",node="n0"}'] == 2
            assert found['cortex_requests_total{endpoint="/v1/messages",model="m",node="n0",status="200"}'] == 2

    run(scenario())
    assert [seen.path for seen in node.seen] == ["/v1/chat/completions"] * 2
    for seen in node.seen:
        assert seen.body["stream"] is True
        assert seen.body["return_progress"] is True
        assert seen.body["model"] == seen.headers["x-helexa-model"] == "m"


def test_a_node_that_dies_before_a_word_is_replaced_without_the_client_s_notice(tmp_path: Path) -> None:
    dead, well = ServingNeuron(), ServingNeuron()
    for node in (dead, well):
        node.plan.append(node.dead)

    async def scenario() -> None:
        async with fleet(tmp_path, dead, well) as gateway:
            well.plan.clear()
            dead.plan.extend([dead.dead] * 3)
            status, events = await streamed(gateway)
            assert status == 200
            assert "error" not in kinds(events)
            assert kinds(events)[-1] == "message_stop"

    run(scenario())


def test_a_node_that_dies_in_the_middle_ends_the_stream_with_an_error_event(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.dies_after_two_words)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            _, events = await streamed(gateway)
            assert kinds(events)[-1] == "error"
            assert "message_stop" not in kinds(events)
            assert events[-1]["error"]["type"] == "api_error"
            assert events[-1]["request_id"]

    run(scenario())


def test_a_whole_answer_that_breaks_off_is_an_error_and_never_half_a_message(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.extend([node.dies_after_two_words] * 3)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            answer = await gateway.post("/v1/messages", asking())
            assert (answer.status, answer.json()["type"]) == (502, "error")
            assert answer.json()["error"]["type"] == "api_error"
            assert answer.headers["request-id"] == answer.json()["request_id"]

    run(scenario())


@pytest.mark.parametrize(
    ("status", "error", "told_status", "told_type", "says"),
    [
        (400, {"code": "invalid_request_error", "message": "`stop` can have 16 strings", "param": "stop"},
         400, "invalid_request_error", "`stop_sequences` can have 16 strings"),
        (400, {"code": "context_length_exceeded", "message": "too long", "n_prompt_tokens": 9, "n_ctx": 8},
         400, "invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"),
        (422, {"code": "template_failed", "message": "the template raised"}, 422, "invalid_request_error", "template"),
        (503, {"code": "overloaded", "message": "all slots are taken"}, 529, "overloaded_error", "all slots"),
        (500, {"code": "internal_error", "message": "it broke"}, 502, "api_error", "it broke"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_node_refuses_is_told_in_anthropic_s_words(
    tmp_path: Path, stream: bool, status: int, error: dict[str, Any], told_status: int, told_type: str, says: str
) -> None:
    node = ServingNeuron()
    node.plan.extend([node.refuses(status, **error)] * 3)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            answer = await gateway.post("/v1/messages", asking(stream=stream))
            told = answer.json()
            assert (answer.status, told["error"]["type"]) == (told_status, told_type)
            assert says in told["error"]["message"]
            assert ("retry-after" in answer.headers) == (told_status == 529)

    run(scenario())


def test_pings_go_out_while_nothing_is_there_to_say(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.silent)

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SETTINGS + "[timeouts]\nstall_s = 3.0\n") as gateway:
            _, events = await streamed(gateway)
            assert [event["type"] for event in events][:1] == ["ping"]
            assert events[-1]["type"] == "error"
            assert events[-1]["error"]["type"] in ("timeout_error", "api_error")

    run(scenario())


def test_a_client_that_leaves_cancels_its_generation(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            body = msgspec.json.encode(asking(stream=True))
            async with gateway.api.stream("POST", "/v1/messages", body) as answer:
                async for part in answer:
                    if b"text_delta" in part:
                        break
            await node.left.wait()

    run(scenario())


def test_the_body_is_judged_before_any_node_is_asked(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            for body, field in (
                (asking(messages="x"), "messages"),
                (asking(max_tokens="7"), "max_tokens"),
                (asking(messages=[{"role": "robot", "content": "x"}]), "messages.0.role"),
                (asking(tools=[{"name": "f"}]), "tools.0.input_schema"),
            ):
                for path in ("/v1/messages", "/v1/messages/count_tokens"):
                    answer = await gateway.post(path, body)
                    assert answer.status == 400
                    assert answer.json()["error"]["type"] == "invalid_request_error"
                    assert answer.json()["error"]["message"].startswith(f"{field}: ")

    run(scenario())
    assert node.seen == []


def test_models_are_listed_by_pages_for_those_who_speak_anthropic(tmp_path: Path) -> None:
    node = ServingNeuron()
    for name in "abcd":
        node.put(name, "loaded", tell=False, capabilities=["chat"])

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            first = (await gateway.get("/v1/models?limit=2", **{"anthropic-version": "2023-06-01"})).json()
            assert [entry["type"] for entry in first["data"]] == ["model", "model"]
            assert first["has_more"] is True
            path = f"/v1/models?limit=9&after_id={first['last_id']}"
            rest = (await gateway.get(path, **{"anthropic-version": "2023-06-01"})).json()
            assert [e["id"] for e in first["data"] + rest["data"]] == ["a", "b", "c", "d", "m"]
            assert rest["has_more"] is False
            assert (await gateway.get("/v1/models")).json()["object"] == "list"
            lost = await gateway.get("/v1/models/none", **{"anthropic-version": "2023-06-01"})
            assert (lost.status, lost.json()["type"]) == (404, "error")

    run(scenario())


def test_what_the_dialects_section_says_is_done(tmp_path: Path) -> None:
    """Both keys, each the other way round than without them."""
    node = ServingNeuron()
    toml = SETTINGS + '[dialects]\nhosted_tools = "refuse"\nkeep_changing_blocks = true\n'

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=toml) as gateway:
            tools = [{"type": "web_search_20250305", "name": "web_search"}]
            assert (await gateway.post("/v1/messages", asking(tools=tools))).status == 400
            blocks = [{"type": "text", "text": "x-anthropic-billing-header: a"}, {"type": "text", "text": "S"}]
            assert (await gateway.post("/v1/messages", asking(system=blocks))).status == 200

    run(scenario())
    assert [part["text"] for part in node.seen[0].body["messages"][0]["content"]] == [
        "x-anthropic-billing-header: a",
        "S",
    ]
