"""What stands still is told from what is slow: the engine, or the whole node, stopped under a request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI
from tests.helpers.gateway import SETTINGS, cortex_process
from tests.helpers.models import smollm2
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.stopped import stopped, stopped_threads

STALL_S = 1.5
TIMEOUTS = f"\n[timeouts]\nstall_s = {STALL_S}\n"
ASK: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Count from one to a thousand, in words."}],
    "max_tokens": 900,
    "logit_bias": {"2": -100},  # never its end of turn
}

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Site:
    node: Daemon
    gateway: Daemon
    client: OpenAI
    before_load: set[int]  # threads of the daemon

    def engine_stopped(self) -> AbstractContextManager[None]:
        """The process with the model (the spare has none), or the engine's threads in the daemon."""
        children = psutil.Process(self.node.process.pid).children()
        if children:
            return stopped(int(max(children, key=lambda child: child.memory_info().rss).pid))
        return stopped_threads(threads(self.node) - self.before_load)


def threads(daemon: Daemon) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{daemon.process.pid}/task")}


@pytest.fixture(params=["process", "none"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    models = f'[[models]]\nid = "smollm2"\nsource = "{smollm2()}"\ncontext = 1024\nslots = 2\nthreads = 1\n'
    with (
        neuron(tmp_path, f'isolation = "{request.param}"\n{TIMEOUTS}') as node,
        cortex_process(tmp_path, {"local": node.url}, toml=SETTINGS + TIMEOUTS, models=models) as gateway,
    ):
        gateway.wait_for(event="node is up")
        before = threads(node)
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            client.chat.completions.create(**{**ASK, "max_tokens": 1})
            yield Site(node, gateway, client, before)


def code_at_the_end_of(stream: Any) -> str | None:
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    return caught.value.code


def test_an_engine_that_stands_still_is_an_error_event_or_a_504_and_serves_again_when_it_goes_on(site: Site) -> None:
    stream = site.client.chat.completions.create(**ASK, stream=True)
    next(iter(stream))
    with site.engine_stopped():
        assert code_at_the_end_of(stream) == "upstream_timeout"
        with pytest.raises(openai.APIStatusError) as caught:
            site.client.chat.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    assert site.client.chat.completions.create(**{**ASK, "max_tokens": 2}).choices[0].message.content


def test_a_node_that_stands_still_is_told_as_a_stall_and_is_out_after_two_polls(site: Site) -> None:
    stream = site.client.chat.completions.create(**ASK, stream=True)
    next(iter(stream))
    with stopped(site.node.process.pid):
        assert code_at_the_end_of(stream) == "upstream_timeout"
        deadline = time.monotonic() + 10
        while site.gateway.http.get("/health").json()["nodes"]["local"] != "down":
            assert time.monotonic() < deadline
        with pytest.raises(openai.InternalServerError) as caught:
            site.client.chat.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (503, "no_node")
    deadline = time.monotonic() + 20
    while site.gateway.http.get("/health").json()["nodes"]["local"] != "up":
        assert time.monotonic() < deadline
    assert site.client.chat.completions.create(**{**ASK, "max_tokens": 2}).choices[0].message.content
