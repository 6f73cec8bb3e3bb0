"""POST /v1/responses on a real `cortex serve` before fake neurons, what is kept of it, and faults in every phase."""

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
SAID = Said("openai", "/v1/responses")
MINE = {"authorization": "Bearer mine"}
YOURS = {"authorization": "Bearer yours"}


@pytest.fixture(autouse=True)
def _is_as_published() -> Iterator[None]:
    yield
    SAID.hold()


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": "Hi", **fields}


async def asked(gateway: Gateway, *, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = await gateway.post("/v1/responses", asking(**fields), headers=headers)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    SAID.answer(found)
    return found


async def streamed(gateway: Gateway, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
    reader, events = sse.EventReader(), []
    body = msgspec.json.encode(asking(stream=True, **fields))
    async with gateway.api.stream("POST", "/v1/responses", body) as answer:
        async for part in answer:
            events += reader.feed(part)
    events = [event for event in events if not event.comment]
    for event in events:
        assert event.name is not None, "every event has its name"
    told = [msgspec.json.decode(event.data) for event in events]
    for data in told:
        SAID.event(data)
    return answer.status, told


def test_a_node_is_asked_for_a_stream_of_its_own_dialect_whatever_the_client_wants(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            whole = await asked(gateway)
            assert whole["output"][0]["content"][0]["text"] == TEXT
            assert whole["usage"]["input_tokens"] == 7
            _, events = await streamed(gateway)
            assert events[-1]["type"] == "response.completed"
            await gateway.line(stream=True)
            found = await gateway.samples()
            assert found['cortex_tokens_total{direction="completion",model="m",node="n0"}'] == 2 * len(WORDS)
            assert found['cortex_time_to_first_token_seconds_count{model="m",node="n0"}'] == 2
            assert found['cortex_requests_total{endpoint="/v1/responses",model="m",node="n0",status="200"}'] == 2

    run(scenario())
    for seen in node.seen:
        assert seen.path == "/v1/chat/completions"
        assert seen.headers["x-helexa-model"] == "m"
        assert seen.body["stream"] is True
        assert seen.body["stream_options"] == {"include_usage": True}
        assert seen.body["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_conversation_goes_on_by_id_and_instructions_do_not(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            first = await asked(gateway, instructions="Be brief.")
            _, events = await streamed(gateway, input="And?", previous_response_id=first["id"], instructions="Sing.")
            second = events[-1]["response"]
            assert second["previous_response_id"] == first["id"]
            await asked(gateway, input=[{"role": "user", "content": "So?"}], previous_response_id=second["id"])
            listed = (await gateway.get(f"/v1/responses/{second['id']}/input_items?order=asc")).json()
            assert [(item["type"], item["role"]) for item in listed["data"]] == [
                ("message", "user"), ("message", "assistant"), ("message", "user"),
            ]  # fmt: skip
            shown = (await gateway.get(f"/v1/responses/{second['id']}/input_items?limit=1")).json()
            assert shown["data"] == listed["data"][-1:]
            assert shown["has_more"] is True
            rest = f"/v1/responses/{second['id']}/input_items?after={shown['last_id']}"
            assert (await gateway.get(rest)).json()["data"] == listed["data"][1::-1]

    run(scenario())
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TEXT}]
    assert node.seen[1].body["messages"] == [{"role": "system", "content": "Sing."}, *said, user("And?")]
    assert node.seen[2].body["messages"] == [*said, user("And?"), said[1], user("So?")]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_item_may_stand_for_one_that_is_kept(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            first = await asked(gateway)
            reference = {"type": "item_reference", "id": first["output"][0]["id"]}
            second = await asked(gateway, input=[reference, {"role": "user", "content": "So?"}])
            await asked(gateway, input="On", previous_response_id=second["id"])
            lost = await gateway.post("/v1/responses", asking(input=[{**reference, "id": "msg_1"}]))
            assert (lost.status, lost.json()["error"]["code"]) == (404, "not_found")
            twice = await gateway.post("/v1/responses", asking(input=[reference, reference]))
            assert (twice.status, twice.json()["error"]["param"]) == (400, "input")
            assert "Duplicate item" in twice.json()["error"]["message"]

    run(scenario())
    said = [{"role": "assistant", "content": TEXT}, user("So?")]
    assert node.seen[1].body["messages"] == said
    assert node.seen[2].body["messages"] == [*said, said[0], user("On")]


def test_what_is_kept_is_its_owner_s_alone_and_goes_when_it_is_told_to(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            made = await asked(gateway, headers=MINE, metadata={"a": "b"})
            path = f"/v1/responses/{made['id']}"
            assert (await gateway.get(path, **MINE)).json() == made
            for path_of in (path, f"{path}/input_items"):
                assert (await gateway.get(path_of, **YOURS)).status == 404
                assert (await gateway.get(path_of)).status == 404
            on = asking(previous_response_id=made["id"])
            assert (await gateway.post("/v1/responses", on, headers=YOURS)).status == 404
            assert (await gateway.post(f"{path}/cancel", {}, headers=MINE)).status == 400
            assert (await gateway.get(f"{path}?stream=true", **MINE)).status == 400
            assert (await gateway.api.fetch("DELETE", path, headers=YOURS)).status == 404
            gone = await gateway.api.fetch("DELETE", path, headers=MINE)
            assert gone.json() == {"id": made["id"], "object": "response", "deleted": True}
            assert (await gateway.get(path, **MINE)).status == 404
            lost = await gateway.post("/v1/responses", on, headers=MINE)
            assert (lost.status, lost.json()["error"]["code"]) == (400, "previous_response_not_found")
            assert lost.json()["error"]["param"] == "previous_response_id"
            unkept = await asked(gateway, store=False)
            assert (await gateway.get(f"/v1/responses/{unkept['id']}")).status == 404

    run(scenario())


def test_a_stream_whose_client_left_is_kept_as_incomplete(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.paused)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            reader, seen = sse.EventReader(), b""
            async with gateway.api.stream("POST", "/v1/responses", msgspec.json.encode(asking(stream=True))) as answer:
                async for part in answer:
                    seen += part
                    if seen.count(b"output_text.delta\n") == 2:
                        break
            made = msgspec.json.decode(reader.feed(seen)[0].data)["response"]["id"]
            await gateway.line(stream=True)
            kept = (await gateway.get(f"/v1/responses/{made}")).json()
            assert kept["status"] == "incomplete"
            assert kept["output"][0]["status"] == "incomplete"
            assert kept["output"][0]["content"][0]["text"] == "Hello"
            await asked(gateway, input="Go on", previous_response_id=made)

    run(scenario())
    assert node.seen[1].body["messages"] == [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Go on")]


def test_a_stream_that_breaks_ends_with_both_events_that_clients_know(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan.append(node.dies_after_two_words)

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            status, events = await streamed(gateway)
            assert status == 200
            failed, error = events[-2:]
            assert failed["type"] == "response.failed"
            assert failed["response"]["status"] == "failed"
            assert failed["response"]["error"]["code"] == "server_error"
            assert failed["response"]["output"][0]["content"][0]["text"] == "Hello"
            assert (error["type"], error["code"]) == ("error", "upstream_error")
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            kept = (await gateway.get(f"/v1/responses/{failed['response']['id']}")).json()
            assert kept == failed["response"]

    run(scenario())


def test_a_node_that_says_nothing_is_told_in_openai_s_envelope(tmp_path: Path) -> None:
    node = ServingNeuron()
    node.plan += [node.dead, node.dead]  # a kept connection may have been closed: that is tried again

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            lost = await gateway.post("/v1/responses", asking())
            assert (lost.status, lost.json()["error"]["code"]) == (502, "upstream_error")

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_node_s_refusal_names_the_field_as_the_client_does(tmp_path: Path, stream: bool) -> None:
    node = ServingNeuron()
    param = "messages[1].content[0].image_url.url"
    node.plan.append(node.refuses(400, code="invalid_request_error", message=f"`{param}` is no image.", param=param))

    async def scenario() -> None:
        async with fleet(tmp_path, node) as gateway:
            image = {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AA=="}
            items = [{"role": "user", "content": [image]}]
            answer = await gateway.post("/v1/responses", asking(input=items, instructions="See.", stream=stream))
            assert answer.status == 400
            error = answer.json()["error"]
            assert error["param"] == "input[0].content[0].image_url.url"
            assert error["message"] == "`input[0].content[0].image_url.url` is no image."

    run(scenario())


def test_a_load_that_fails_under_heartbeats_is_told_in_events(tmp_path: Path) -> None:
    """The head is out by then, and no node was asked."""
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SETTINGS + "[loading]\nwait_s = 2.5\n") as gateway:
            node.put("n", "loading")
            await gateway.until("/v1/models/n", lambda said: said["status"]["value"] == "loading")
            status, events = await streamed(gateway, model="n")
            assert status == 200
            assert [event["type"] for event in events] == [
                "response.created", "response.in_progress", "response.failed", "error",
            ]  # fmt: skip
            assert events[-1]["code"] == "model_loading"

    run(scenario())


def test_the_response_has_begun_while_its_model_loads_and_a_node_is_lost(tmp_path: Path) -> None:
    """To clients that count events, and not comments, nothing has happened before."""
    node, other = ServingNeuron(), ServingNeuron()
    for each in (node, other):
        each.plan += [each.silent_until_dropped, each.silent_until_dropped]

    async def scenario() -> None:
        async with fleet(tmp_path, node, other) as gateway:
            reader, events = sse.EventReader(), []
            body = msgspec.json.encode(asking(stream=True))
            async with gateway.api.stream("POST", "/v1/responses", body) as answer:
                async for part in answer:
                    events += [event for event in reader.feed(part) if not event.comment]
                    if len(events) == 2:
                        for each in (node, other):
                            each.plan.clear()
                            each.drop.set()
            said = [msgspec.json.decode(event.data) for event in events]
            assert [event["type"] for event in said[:3]] == [
                "response.created", "response.in_progress", "response.output_item.added",
            ]  # fmt: skip
            assert said[-1]["type"] == "response.completed"
            assert [event["sequence_number"] for event in said] == list(range(len(said)))

    run(scenario())
    assert len(node.seen) + len(other.seen) == 2


def test_what_is_kept_has_a_bound(tmp_path: Path) -> None:
    node = ServingNeuron()

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=SETTINGS + "[responses]\nstore_mb = 0\n") as gateway:
            made = await asked(gateway)
            assert (await gateway.get(f"/v1/responses/{made['id']}")).status == 404

    run(scenario())


def test_a_conversation_goes_on_after_the_gateway_was_started_anew(tmp_path: Path) -> None:
    node = ServingNeuron()
    toml = SETTINGS + f'[responses]\npath = "{tmp_path}/kept.sqlite"\n'

    async def scenario() -> None:
        async with fleet(tmp_path, node, toml=toml) as gateway:
            first = await asked(gateway)
            assert await gateway.stop() == 0
        async with fleet(tmp_path, node, toml=toml) as gateway:
            await asked(gateway, input="On", previous_response_id=first["id"])

    run(scenario())
    assert node.seen[1].body["messages"] == [user("Hi"), {"role": "assistant", "content": TEXT}, user("On")]
