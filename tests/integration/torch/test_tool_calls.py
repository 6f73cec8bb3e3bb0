"""A real model (SmolLM2, safetensors) calls a tool because it must: templates, grammar, engine and parser together."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import safetensors_models
from tests.helpers.aio import run

from helexa.core import sse
from helexa.core.lifecycle import LoadRequest
from helexa.core.relay.upstream import Answer, Upstream
from helexa.neuron.harness.base import FreeDevice, ModelFiles
from helexa.neuron.harness.collect import Collector
from helexa.neuron.harness.openai_lists import CHAT
from helexa.neuron.harness.torch import TorchHarness

KEY = "secret"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Paris", "Rome"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather in Rome for 3 days?"}],
    "tools": TOOLS,
    "temperature": 0,
    "max_tokens": 60,
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def upstream_of() -> Iterator[str]:
    folder = safetensors_models.smollm2()
    harness = TorchHarness()
    request = LoadRequest(model_id="smollm2", context=1024, slots=2)
    files = ModelFiles("smollm2", tuple(sorted(folder.glob("*.safetensors"))))
    device = FreeDevice(index=0, kind="cpu", name="cpu", free_mb=8000, total_mb=16000)
    plan = harness.plan(request, files, harness.inspect(files, request), [device])
    with tempfile.TemporaryDirectory(prefix="helexa-") as place:
        socket = Path(place) / "s"
        served = harness.serve(harness.host_spec(plan, socket, KEY), lambda _: None)
        try:
            yield f"unix:{socket}"
        finally:
            served.close()


def ask(address: str, body: dict[str, Any]) -> Answer:
    async def fetch() -> Answer:
        upstream = Upstream("host", address, headers={"authorization": f"Bearer {KEY}"})
        try:
            return await upstream.fetch("POST", CHAT, json.dumps(body).encode(), timeout_s=120)
        finally:
            upstream.close()

    return run(fetch())


def test_a_forced_call_is_made_with_arguments_by_their_schema(upstream_of: str) -> None:
    body = BODY | {"tool_choice": FORCED}
    whole = ask(upstream_of, body).json(dict[str, Any])["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    streamed = ask(upstream_of, body | {"stream": True})
    collector = Collector()
    *events, _ = sse.EventReader().feed(streamed.body)
    for event in events:
        collector.add(json.loads(event.data))
    (same,) = collector.answer()["choices"][0]["message"]["tool_calls"]
    assert same["function"] == call["function"]


def test_the_result_of_a_call_is_read_by_the_model(upstream_of: str) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Rome","days":3}'},
    }
    messages = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    answer = ask(upstream_of, BODY | {"messages": messages, "tool_choice": "none"}).json(dict[str, Any])
    assert answer["choices"][0]["message"]["content"]


def test_a_required_call_may_be_of_any_tool(upstream_of: str) -> None:
    choice = ask(upstream_of, BODY | {"tool_choice": "required"}).json(dict[str, Any])["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] in ("get_weather", "get_time")
