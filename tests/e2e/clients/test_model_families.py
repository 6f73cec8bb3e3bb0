"""Calls and thoughts as model families write them, read by the engine's parsers and told the same, whole or streamed.

The templates are cut down to what the engine's choice of a parser depends on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tests.helpers import playing_gguf
from tests.helpers.playing_gguf import TEMPLATE, Turn
from tests.helpers.stage import Stage

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates" / "cut_down"
GIVEN = {"path": "greeting.txt", "content": "Grüße 😀"}
ARGUMENTS = json.dumps(GIVEN, ensure_ascii=False)
WRITE: Any = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in GIVEN},
            "required": list(GIVEN),
        },
    },
}
HERMES = "I write.\n" + playing_gguf.call("write", **GIVEN)
CODER = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in GIVEN.items())
HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.write "
    f"<|constrain|>json<|message|>{ARGUMENTS}"
)
OPENED = TEMPLATE.replace("assistant\\n' }}{%- endif %}\n", "assistant\\n<think>\\n' }}{%- endif %}\n")

pytestmark = pytest.mark.timeout(60)


def stored(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


FAMILIES = {
    "hermes": (TEMPLATE, f"<think>\nHm.\n</think>\n\n{HERMES}", "Hm.", "I write."),
    "deepseek-r1": (OPENED, f"Hm.\n</think>\n\n{HERMES}", "Hm.", "I write."),
    "llama3": (stored("llama3"), f'{{"name": "write", "parameters": {ARGUMENTS}}}', "", ""),
    "mistral": (
        stored("mistral"),
        f'[TOOL_CALLS][{{"name": "write", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}]',
        "",
        "",
    ),
    "qwen3-coder": (
        stored("qwen3_coder"),
        f"I write.\n<tool_call>\n<function=write>\n{CODER}</function>\n</tool_call>",
        "",
        "I write.",
    ),
    "harmony": (
        stored("harmony"),
        HARMONY,
        "Hm.",
        "",
    ),
}


def told(message: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    thought = getattr(message, "reasoning_content", None) or ""
    return thought.strip(), (message.content or "").strip(), calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_read_from_what_the_family_writes_and_its_result_goes_back(site: Stage, family: str) -> None:
    template, says, thought, text = FAMILIES[family]
    last = "<|channel|>final<|message|>Done." if family == "harmony" else "Done."
    last = f"Hm.\n</think>\n\n{last}" if template is OPENED else last
    model = site.play(family, [Turn(says), Turn(last, after="written")], template=template)
    messages: list[Any] = [{"role": "user", "content": "Write a greeting."}]
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": model, "messages": messages, "tools": [WRITE], "max_tokens": 200}
        whole = client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert told(whole.message) == (thought, text, [("write", GIVEN)])
        assert told(streamed.message) == told(whole.message)
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"
        call = (whole.message.tool_calls or [])[0]
        messages += [whole.message, {"role": "tool", "tool_call_id": call.id, "content": "written"}]
        assert (client.chat.completions.create(**asked).choices[0].message.content or "").strip() == "Done."


def test_a_call_that_the_limit_cut_off_ends_with_length(site: Stage) -> None:
    model = site.play("cut", [Turn(HERMES)])
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": model, "messages": [{"role": "user", "content": "Write."}], "tools": [WRITE]}
        whole = client.chat.completions.create(**asked, max_tokens=18).choices[0]
        streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, max_tokens=18, stream=True)]
    assert whole.finish_reason == streamed[-1].finish_reason == "length"
    pieces = [call.function for choice in streamed for call in choice.delta.tool_calls or () if call.function]
    (call,) = whole.message.tool_calls or ()
    assert "".join(piece.arguments or "" for piece in pieces) == call.function.arguments
    assert ARGUMENTS.startswith(call.function.arguments)
