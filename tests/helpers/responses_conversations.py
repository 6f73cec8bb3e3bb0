"""Hypothesis strategies for OpenAI's Responses: whole conversations as clients send them. What a neuron streams is in
anthropic_conversations: it is the same for every dialect."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from tests.helpers.anthropic_conversations import NAME, OBJECT, PIXEL, SAID, TEXT

INPUT_TEXT = st.fixed_dictionaries({"type": st.just("input_text"), "text": TEXT})
IMAGE = st.just({"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{PIXEL}"})
PARTS = st.lists(INPUT_TEXT | IMAGE, max_size=3)
ROLES = st.sampled_from(["user", "system", "developer"])
TYPED = st.sampled_from([{"type": "message"}, {}])
OUTPUT = TEXT | st.lists(INPUT_TEXT | IMAGE, max_size=3)
THOUGHT = st.fixed_dictionaries(
    {
        "type": st.just("reasoning"),
        "id": st.sampled_from(["rs_hx1o0", "rs_68ab"]),
        "summary": st.lists(st.fixed_dictionaries({"type": st.just("summary_text"), "text": TEXT}), max_size=2),
    },
    optional={"encrypted_content": st.none() | st.sampled_from(["hx1.aG0=", "hx1.%", "gAAAAABo"])},
)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    return {**draw(TYPED), "role": draw(ROLES), "content": draw(TEXT | PARTS)}


@st.composite
def said(draw: st.DrawFn) -> dict[str, Any]:
    text = draw(TEXT)
    part = {"type": "output_text", "text": text, "annotations": []}
    whole = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}
    return draw(st.sampled_from([whole, {"role": "assistant", "content": text}]))


@st.composite
def tools(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(NAME, unique=True, max_size=4))
    made: list[dict[str, Any]] = []
    for name in names:
        schema = {"type": "object", "properties": {key: {} for key in draw(st.lists(NAME, max_size=2))}}
        function = {"type": "function", "name": name, "parameters": schema, "strict": draw(st.none() | st.booleans())}
        made.append(
            draw(
                st.sampled_from(
                    [
                        function,
                        {"type": "custom", "name": name, "format": {"type": "text"}},
                        {"type": "namespace", "name": f"ns-{name}", "description": "of them", "tools": [function]},
                    ]
                )
            )
        )
    return made


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A whole body of POST /v1/responses: turns by turns, each call answered after it."""
    given_tools = draw(tools())
    body: dict[str, Any] = {"model": "any"}
    if given_tools:
        body["tools"] = given_tools
        body["tool_choice"] = draw(st.sampled_from(["auto", "required", "none"]))
    body |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "instructions": TEXT,
                "temperature": st.floats(0, 2),
                "top_p": st.floats(0, 1),
                "top_logprobs": st.integers(0, 20),
                "max_output_tokens": st.integers(1, 100_000),
                "stream": st.booleans(),
                "store": st.booleans(),
                "parallel_tool_calls": st.booleans(),
                "metadata": st.dictionaries(NAME, TEXT, max_size=3),
                "user": SAID,
                "prompt_cache_key": SAID,
                "include": st.just(["reasoning.encrypted_content"]),
                "text": st.sampled_from([{"format": {"type": "text"}}, {"format": {"type": "json_object"}}]),
                "reasoning": st.sampled_from(
                    [{"effort": "none"}, {"effort": "high", "summary": "auto"}, {"summary": "detailed"}]
                ),
            },
        )
    )
    if draw(st.booleans()):
        return {**body, "input": draw(SAID)}
    numbers = iter(range(1000))
    items: list[dict[str, Any]] = [draw(messages())]
    for _ in range(draw(st.integers(0, 4))):
        items += draw(st.lists(messages(), max_size=2))
        items += draw(st.lists(THOUGHT, max_size=1)) + draw(st.lists(said(), max_size=2))
        calls = [_call(draw, tool, f"call_{next(numbers)}") for tool in _some(draw, given_tools)]
        items += calls
        for call in calls:
            kind = f"{call['type']}_output"
            items.append({"type": kind, "call_id": call["call_id"], "output": draw(OUTPUT)})
    return {**body, "input": items}


def _some(draw: st.DrawFn, given_tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return draw(st.lists(st.sampled_from(given_tools), max_size=2)) if given_tools else []


def _call(draw: st.DrawFn, tool: dict[str, Any], call_id: str) -> dict[str, Any]:
    if tool["type"] == "custom":
        return {"type": "custom_tool_call", "call_id": call_id, "name": tool["name"], "input": draw(TEXT)}
    arguments = json.dumps(draw(OBJECT))
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": call_id, "arguments": arguments}
    if tool["type"] == "namespace":
        return {**call, "name": tool["tools"][0]["name"], "namespace": tool["name"]}
    return {**call, "name": tool["name"]}
