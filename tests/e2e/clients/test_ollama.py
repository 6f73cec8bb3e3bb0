"""The ollama package with a model that thinks and calls tools: raw model text through the engine's own parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ollama import ChatResponse, Client
from tests.helpers.playing_gguf import Turn, call
from tests.helpers.stage import Stage
from tests.helpers.strictly import strictly

QUESTION = {"role": "user", "content": "How warm is it in Rome?"}
FIRST = "<think>\nI have to look.\n</think>\n\nA moment.\n" + call("get_weather", city="Rome", days=2)
LAST = "<think>\nThere it is.\n</think>\n\nIt is 21 degrees: schön 😀"
MODEL = "ollama-caller"

pytestmark = pytest.mark.timeout(120)


def get_weather(city: str, days: int) -> str:
    """The weather at a place.

    Args:
      city: its name
      days: how many of them
    """
    return f"{city}, {days} days: 21 degrees"


@pytest.fixture(scope="module")
def client(site: Stage) -> Iterator[Client]:
    site.play(MODEL, [Turn(FIRST), Turn(LAST, after="21 degrees")], context=4096)
    with Client(site.url, timeout=60) as made:
        yield made


def said(answer: Any) -> dict[str, Any]:
    """What counts of a message, whole or put together from a stream."""
    parts = answer if isinstance(answer, list) else [answer]
    return {
        "content": "".join(part.message.content or "" for part in parts),
        "thinking": "".join(part.message.thinking or "" for part in parts),
        "calls": [
            (c.function.name, dict(c.function.arguments)) for part in parts for c in part.message.tool_calls or ()
        ],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_of_the_program_is_called_and_its_result_goes_back(client: Client, stream: bool) -> None:
    messages: list[Any] = [QUESTION]
    answer: Any = client.chat(MODEL, messages, tools=[get_weather], stream=stream)
    first = said(list(answer) if stream else answer)
    assert first["thinking"].strip() == "I have to look."
    assert first["content"].strip() == "A moment."
    assert first["calls"] == [("get_weather", {"city": "Rome", "days": 2})]
    ((name, arguments),) = first["calls"]
    made = [{"function": {"name": name, "arguments": arguments}}]
    messages += [
        {"role": "assistant", "content": first["content"], "thinking": first["thinking"], "tool_calls": made},
        {"role": "tool", "tool_name": name, "content": get_weather(**arguments)},
    ]
    answer = client.chat(MODEL, messages, tools=[get_weather], stream=stream)
    last = said(list(answer) if stream else answer)
    assert last == {"content": "It is 21 degrees: schön 😀", "thinking": last["thinking"], "calls": []}
    assert last["thinking"].strip() == "There it is."


def test_a_call_that_the_token_limit_cut_off_is_no_call(site: Stage, client: Client) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
    whole = client.chat(MODEL, [QUESTION], tools=[tool])
    assert whole.eval_count is not None
    body = {
        "model": MODEL,
        "messages": [QUESTION],
        "tools": [tool],
        "options": {"num_predict": whole.eval_count - 8},
    }
    answer = httpx.post(f"{site.url}/api/chat", json=body, timeout=60)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    for line in lines:
        strictly(ChatResponse, line)
    assert lines[-1]["done_reason"] == "length"
    assert not any("tool_calls" in line["message"] for line in lines)
