"""The hub behind GET /events: order, coalescing, and what becomes of who does not read."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
from tests.helpers.aio import run

from helexa.core.sse import EventReader
from helexa.neuron.events import EventStream, Hub, Subscription


def model(model_id: str, status: str, **more: Any) -> dict[str, Any]:
    return {"id": model_id, "status": status, **more}


def at(fraction: float) -> dict[str, Any]:
    return model("a", "loading", progress={"phase": "loading", "fraction": fraction})


async def taken(subscription: Subscription) -> list[dict[str, Any]]:
    data = await subscription.take(5.0)
    assert data is not None
    return decoded(data)


def decoded(data: bytes) -> list[dict[str, Any]]:
    return [msgspec.json.decode(event.data) for event in EventReader().feed(data) if not event.comment]


def test_a_snapshot_comes_first_and_numbers_go_on_from_its_own() -> None:
    async def scenario() -> None:
        hub = Hub(lambda: {"models": [model("a", "unloaded")], "devices": [], "draining": False})
        hub.publish("model", model("a", "loading"))
        with hub.subscribe() as subscription:
            hub.publish("model", model("a", "loaded"))
            hub.publish("draining", {"draining": True})
            events = await taken(subscription)
        assert [event["type"] for event in events] == ["snapshot", "model", "draining"]
        assert [event["seq"] for event in events] == [1, 2, 3]
        assert events[0]["models"] == [model("a", "unloaded")]
        assert events[1]["id"] == "a"
        assert events[1]["status"] == "loaded"

    run(scenario())


def test_progress_is_sent_as_its_latest_and_never_after_the_state_that_follows() -> None:
    async def scenario() -> None:
        hub = Hub(dict, progress_s=0.02)
        with hub.subscribe() as subscription:
            for percent in range(50):
                hub.publish("model", at(percent / 100))
            first = await taken(subscription)
            later = await taken(subscription)
            hub.publish("model", at(0.9))
            hub.publish("model", model("a", "loaded"))
            last = await taken(subscription)
            assert await subscription.take(0.05) == b":\n\n"  # the 0.9 was overtaken, and never comes
        assert [event.get("progress", {}).get("fraction") for event in first] == [None, 0.0]
        assert [event["progress"]["fraction"] for event in later] == [0.49]
        assert [event["status"] for event in last] == ["loaded"]

    run(scenario())


def test_who_does_not_read_is_cut_off_and_holds_nobody_up() -> None:
    async def scenario() -> None:
        hub = Hub(dict, backlog=4)
        with hub.subscribe() as slow, hub.subscribe() as quick:
            seen = 0
            for number in range(10):
                hub.publish("device", {"index": number})
                seen += len(await taken(quick))
            assert seen == 11
            assert slow.dropped
            assert await slow.take() is None
            assert not quick.dropped

    run(scenario())


def test_a_comment_comes_when_nothing_else_does() -> None:
    async def scenario() -> None:
        hub = Hub(dict)
        with hub.subscribe() as subscription:
            await taken(subscription)
            assert await subscription.take(0.01) == b":\n\n"

    run(scenario())


def test_closing_the_hub_sends_what_waits_and_ends_every_stream() -> None:
    async def scenario() -> None:
        hub = Hub(dict)
        with hub.subscribe() as subscription:
            hub.publish("model", at(0.1))
            hub.publish("model", at(0.2))
            hub.close()
            assert [event["type"] for event in await taken(subscription)] == ["snapshot", "model", "model"]
            assert await subscription.take() is None
        with hub.subscribe() as late:
            assert [event["type"] for event in await taken(late)] == ["snapshot"]
            assert await late.take() is None

    run(scenario())


class Client:
    """The other side of an ASGI application: keeps what is sent, and leaves when told."""

    def __init__(self) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self.gone = asyncio.Event()
        self.got_body = asyncio.Event()
        self.blocked = False

    async def receive(self) -> MutableMapping[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.blocked and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.got_body.set()


def test_a_stream_ends_when_its_client_leaves() -> None:
    async def scenario() -> None:
        hub, client = Hub(dict), Client()
        streaming = asyncio.create_task(
            EventStream(hub)({"type": "http", "method": "GET"}, client.receive, client.send)
        )
        await client.got_body.wait()
        client.gone.set()
        await streaming
        assert client.sent[0]["status"] == 200
        assert decoded(client.sent[1]["body"])[0]["type"] == "snapshot"
        assert len(client.sent) == 2  # nothing is sent to nobody

    run(scenario())


def test_a_client_that_takes_nothing_is_given_up_without_an_end() -> None:
    async def scenario() -> None:
        hub, client = Hub(dict), Client()
        client.blocked = True
        await EventStream(hub, send_s=0.01)({"type": "http", "method": "GET"}, client.receive, client.send)
        assert [message["type"] for message in client.sent] == ["http.response.start"]

    run(scenario())


def test_a_head_request_is_answered_without_a_stream() -> None:
    async def scenario() -> None:
        client = Client()
        await EventStream(Hub(dict))({"type": "http", "method": "HEAD"}, client.receive, client.send)
        assert [message.get("body") for message in client.sent] == [None, b""]

    run(scenario())
