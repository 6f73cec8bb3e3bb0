"""The host, the node and the gateway are killed in the middle of a stream: who hears what, and what comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI
from tests.helpers.gateway import cortex_process
from tests.helpers.models import smollm2
from tests.helpers.neuron_daemon import Daemon, neuron

PROFILE = {"model_id": "smollm2", "context": 1024, "slots": 2, "threads": 1}
LONG: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Count from one to a thousand, in words."}],
    "max_tokens": 900,
    "temperature": 0,
    "logit_bias": {"2": -100},  # never its end of turn: it goes on until max_tokens
    "stream": True,
}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 4, "stream": False}

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Site:
    nodes: dict[str, Daemon]
    gateway: Daemon
    client: OpenAI

    def state(self, name: str) -> str:
        states: dict[str, str] = self.gateway.http.get("/health").json()["nodes"]
        return states[name]

    def load(self, *names: str) -> None:
        for name in names:
            answer = self.nodes[name].http.post("/models/load?wait=true", json={**PROFILE, "source": str(smollm2())})
            assert answer.status == 200, answer.text
        until(lambda: self.holding() == set(names), 5, f"the gateway sees {names}")

    def holding(self) -> set[str]:
        (entry,) = self.gateway.http.get("/v1/models").json()["data"]
        return {node["name"] for node in entry["nodes"] if node["status"] == "loaded" and "state" not in node}


def until(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def busy(node: Daemon) -> int:
    return sum(info.get("active_requests") or 0 for info in node.http.get("/models").json())


def broken(stream: Any) -> openai.APIError:
    """The error that this stream ends in. The SDK raises it for an error event; a stream that merely stopped, or
    ended in a fake [DONE], would end without one."""
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    return caught.value


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with neuron(folders[0]) as first, neuron(folders[1]) as second:
        nodes = {"a": first, "b": second}
        urls = {name: node.url for name, node in nodes.items()}
        models = f'[[models]]\nid = "smollm2"\nsource = "{smollm2()}"\ncontext = 1024\nslots = 2\nthreads = 1\n'
        with cortex_process(tmp_path, urls, models=models) as gateway:
            for name in nodes:
                gateway.wait_for(event="node is up", node=name)
            with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                yield Site(nodes, gateway, client)


def test_a_killed_host_ends_its_streams_with_an_error_and_comes_back_by_itself(site: Site) -> None:
    site.load("a")
    stream = site.client.chat.completions.create(**LONG)
    next(iter(stream))
    (host,) = [
        child
        for child in psutil.Process(site.nodes["a"].process.pid).children()
        if child.memory_info().rss > 90 << 20  # the one with the model, not the spare
    ]
    host.kill()
    error = broken(stream)
    assert error.code == "upstream_error"
    assert "smollm2" in error.message or "a " in error.message
    line = site.gateway.wait_for(10.0, event="request", status=502)
    assert (line["stream"], line["node"]) == (True, "a")
    assert site.client.chat.completions.create(**SHORT).choices[0].message.content  # recovered, or loaded elsewhere


def test_a_killed_node_ends_its_streams_with_an_error_and_the_other_takes_over(site: Site) -> None:
    site.load("a", "b")
    stream = site.client.chat.completions.create(**LONG)
    next(iter(stream))
    (victim,) = [name for name, node in site.nodes.items() if busy(node)]
    (other,) = site.nodes.keys() - {victim}
    os.kill(site.nodes[victim].process.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert broken(stream).code == "upstream_error"
    for _ in range(3):  # no client sees the dead node, not even before a poll has missed it
        assert site.client.chat.completions.create(**SHORT).choices[0].message.content
    until(lambda: site.state(victim) == "down", 5, "the node is down")
    # two poll intervals, and what the requests above took of them
    assert time.monotonic() - killed < 10
    assert site.state(other) == "up"
    assert site.holding() == {other}
    (entry,) = site.gateway.http.get("/v1/models").json()["data"]
    assert len(entry["nodes"]) == 2  # what the dead node had stays listed


def test_a_killed_gateway_frees_the_seat_of_its_stream(site: Site) -> None:
    site.load("a")
    stream = site.client.chat.completions.create(**LONG)
    next(iter(stream))
    assert busy(site.nodes["a"]) == 1
    os.kill(site.gateway.process.pid, signal.SIGKILL)
    until(lambda: busy(site.nodes["a"]) == 0, 5, "the seat is free")
    with pytest.raises(Exception):  # noqa: B017 - whichever of httpx's: the connection is cut, there is no event
        list(stream)
