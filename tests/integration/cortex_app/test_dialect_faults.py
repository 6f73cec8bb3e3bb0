"""A node that dies, one that stands still, a client that is gone, and the gateway's own end, in the middle of a stream:
each told in the client's dialect, and never as an answer that is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers.aio import run
from tests.helpers.fleets_of_fakes import fleet
from tests.helpers.gateway import SETTINGS, Gateway
from tests.helpers.serving_neuron import WORDS, ServingNeuron

from helexa.core import sse

SHORT_STALL = SETTINGS + "[timeouts]\nstall_s = 1.0\n"
SHORT_DRAIN = SETTINGS.replace("drain_s = 5", "drain_s = 0.3")
SAID = "".join(WORDS[:2])  # before what is planned happens

Event = dict[str, Any]


def of_events(body: bytes) -> list[Event]:
    found = [event for event in sse.EventReader().feed(body) if not event.comment]
    return [{"done": True} if event.data == b"[DONE]" else msgspec.json.decode(event.data) for event in found]


def of_lines(body: bytes) -> list[Event]:
    return [msgspec.json.decode(line) for line in body.splitlines()]


def chat_text(event: Event) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


@dataclass(frozen=True)
class Spoken:
    """One dialect: how it asks for a stream, reads one, and tells an error at its end.

    text: of an event.   whole: what the last event of an answer that is whole has.   error: its kind, of the last event
    """

    path: str
    ask: dict[str, Any]
    read: Callable[[bytes], list[Event]]
    text: Callable[[Event], str]
    whole: Callable[[Event], bool]
    error: Callable[[Event], str]
    died: str
    stalled: str
    ends: str


MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
DIALECTS = {
    "openai": Spoken(
        "/v1/chat/completions", MESSAGES, of_events, chat_text,
        lambda event: "done" in event,
        lambda event: event["error"]["code"],
        "upstream_error", "upstream_timeout", "shutting_down",
    ),
    "anthropic": Spoken(
        "/v1/messages", {**MESSAGES, "max_tokens": 9}, of_events,
        lambda event: event["delta"]["text"] if event["type"] == "content_block_delta" else "",
        lambda event: event["type"] == "message_stop",
        lambda event: event["error"]["type"],
        "api_error", "timeout_error", "api_error",
    ),
    "responses": Spoken(
        "/v1/responses", {"model": "m", "input": "Hi", "stream": True}, of_events,
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
        lambda event: event["type"] == "response.completed",
        lambda event: event["code"],
        "upstream_error", "upstream_timeout", "shutting_down",
    ),
    "ollama": Spoken(
        "/api/chat", MESSAGES, of_lines,
        lambda line: line.get("message", {}).get("content", ""),
        lambda line: line.get("done") is True,
        lambda line: line["error"],
        "n0", "stalled", "Shutting down",
    ),
}  # fmt: skip


@pytest.fixture(params=DIALECTS)
def spoken(request: pytest.FixtureRequest) -> Spoken:
    return DIALECTS[request.param]


async def fleet_says(folder: Path, toml: str, scenario: Callable[[Gateway, ServingNeuron], Any]) -> None:
    node = ServingNeuron()
    async with fleet(folder, node, toml=toml) as gateway:
        await scenario(gateway, node)


async def ask(gateway: Gateway, spoken: Spoken) -> list[Event]:
    body = b""
    async with gateway.api.stream("POST", spoken.path, msgspec.json.encode(spoken.ask)) as answer:
        assert answer.status == 200
        async for part in answer:
            body += part
    return spoken.read(body)


def check(spoken: Spoken, told: list[Event], error: str) -> None:
    """What was said until then, and the error as the last word."""
    assert "".join(map(spoken.text, told[:-1])) == SAID
    assert error in spoken.error(told[-1])
    assert not any(map(spoken.whole, told))


def test_a_node_that_dies_or_stands_still_ends_the_stream_with_an_error(tmp_path: Path, spoken: Spoken) -> None:
    async def scenario(gateway: Gateway, node: ServingNeuron) -> None:
        node.plan.append(node.dies_after_two_words)
        check(spoken, await ask(gateway, spoken), spoken.died)
        node.plan.append(node.paused)
        check(spoken, await ask(gateway, spoken), spoken.stalled)
        await asyncio.wait_for(node.left.wait(), 5)
        told = await ask(gateway, spoken)
        assert spoken.whole(told[-1])

    run(fleet_says(tmp_path, SHORT_STALL, scenario))


def test_a_client_that_is_gone_takes_its_generation_with_it(tmp_path: Path, spoken: Spoken) -> None:
    async def scenario(gateway: Gateway, node: ServingNeuron) -> None:
        node.plan.append(node.paused)
        async with gateway.api.stream("POST", spoken.path, msgspec.json.encode(spoken.ask)) as answer:
            seen = b""
            async for part in answer:
                seen += part
                if "".join(map(spoken.text, spoken.read(seen[: seen.rfind(b"\n") + 1]))) == SAID:
                    break
        await asyncio.wait_for(node.left.wait(), 1.5)
        line = await gateway.line(client_gone=True)
        assert line["node"] == "n0"
        assert spoken.whole((await ask(gateway, spoken))[-1])

    run(fleet_says(tmp_path, SETTINGS, scenario))


def test_a_drain_lets_a_stream_end_and_tells_one_that_does_not(tmp_path: Path, spoken: Spoken) -> None:
    async def finishes(gateway: Gateway, node: ServingNeuron) -> None:
        node.plan.append(node.paused)
        running = asyncio.create_task(ask(gateway, spoken))
        await node.arrived.wait()
        ending = asyncio.create_task(gateway.stop())
        await asyncio.to_thread(gateway.daemon.wait_for, event="shutting down")
        late = await gateway.post(spoken.path, spoken.ask)
        assert (late.status, "retry-after" in late.headers) == (503, True)
        node.go_on.set()
        assert spoken.whole((await running)[-1])
        assert await ending == 0

    async def is_cut(gateway: Gateway, node: ServingNeuron) -> None:
        node.plan.append(node.paused)
        running = asyncio.create_task(ask(gateway, spoken))
        await node.arrived.wait()
        assert await gateway.stop() == 0
        check(spoken, await running, spoken.ends)

    run(fleet_says(tmp_path, SETTINGS, finishes))
    run(fleet_says(tmp_path, SHORT_DRAIN, is_cut))
