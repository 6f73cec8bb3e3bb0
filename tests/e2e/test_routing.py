"""A real gateway before three real nodes that have one model loaded: conversations stay with their prompt cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.gateway import SETTINGS, cortex_process
from tests.helpers.http import Http
from tests.helpers.neuron_daemon import Daemon, neuron
from tests.helpers.tiny_gguf import Shape, chat_model

pytestmark = pytest.mark.timeout(120)

SHAPE = Shape(n_embd=256, n_layer=4, n_head=8, n_head_kv=8, n_ff=1024)


@dataclass(frozen=True)
class Site:
    nodes: dict[str, Daemon]
    gateway: Http
    model: Path

    def ask(self, messages: list[dict[str, str]], **fields: Any) -> tuple[str, Any]:
        """The node that answered, and its answer."""
        body = {"model": "m", "messages": messages, "max_tokens": 8, **fields}
        asked = {"x-helexa-explain": "1"}
        answer = self.gateway.request("POST", "/v1/chat/completions", json=body, headers=asked, timeout_s=60)
        assert answer.status == 200, answer.text
        return answer.headers["x-helexa-route"].split(" ", 1)[0], answer.json()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("routing")
    model = chat_model(folder / "m.gguf", SHAPE, seed=1)
    with ExitStack() as stack:
        nodes = {}
        for name in ("n0", "n1", "n2"):
            (folder / name).mkdir()
            nodes[name] = stack.enter_context(neuron(folder / name, f'allowed_roots = ["{folder}"]\n'))
            load(nodes[name], model)
        named = {name: node.url for name, node in nodes.items()}
        gateway = stack.enter_context(cortex_process(folder, named, toml=SETTINGS))
        for name in named:
            gateway.wait_for(event="node is up", node=name)
        yield Site(nodes, gateway.http, model)


def load(node: Daemon, model: Path) -> None:
    profile = {"model_id": "m", "source": str(model), "context": 2048, "slots": 2, "threads": 1}
    answer = node.http.request("POST", "/models/load?wait=true", json=profile, timeout_s=60)
    assert answer.status == 200, answer.text


def opening(topic: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"{topic}: be brief. " * 18}]


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": f"{text} " * 5}


def test_a_conversation_that_grows_stays_where_its_prompt_is_cached(site: Site) -> None:
    messages, places, cached = opening("stay"), [], []
    for turn in range(5):
        messages = [*messages, said(f"question {turn}")]
        place, answer = site.ask(messages)
        places.append(place)
        usage = answer["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
        messages = [*messages, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}]
    assert len(set(places)) == 1
    assert cached[0] < 0.1
    assert min(cached[1:]) > 0.5, cached


def test_other_conversations_spread_meanwhile(site: Site) -> None:
    with ThreadPoolExecutor(3) as clients:
        asked = [[*opening(f"topic {number}"), said("go on")] for number in range(3)]
        answers = clients.map(lambda messages: site.ask(messages, max_tokens=200, logit_bias={"2": -100}), asked)
        assert {place for place, _ in answers} == set(site.nodes)


def test_a_conversation_goes_on_elsewhere_when_its_node_has_unloaded_the_model(site: Site) -> None:
    messages = [*opening("move"), said("first")]
    first, _ = site.ask(messages)
    node = site.nodes[first]
    assert node.http.post("/models/unload", {"model_id": "m", "drain_s": 5}).status == 200
    second, answer = site.ask([*messages, said("second")])
    assert second != first
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] < answer["usage"]["prompt_tokens"] / 2
    load(node, site.model)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_prefill_rate_is_measured_by_what_the_nodes_say_of_each_answer(site: Site, path: str, stream: bool) -> None:
    def rates() -> dict[str, float]:
        nodes = site.gateway.get("/fleet").json()["nodes"]
        return {node["name"]: node["models"][0].get("prefill_tokens_per_s", 0.0) for node in nodes}

    before = rates()
    messages = [said(f"rate {path} {stream} " * 5)]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "stream": stream}
    assert site.gateway.request("POST", path, json=body, timeout_s=60).status == 200
    assert sum(rates()[name] != before[name] for name in before) == 1
