"""What a request may make the loop do grows with its bytes and no faster, whatever is in them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from helexa.core.bodies import MAX_MESSAGES, MAX_TOOLS
from helexa.core.dialects import anthropic_request, ollama_request, responses_request
from helexa.core.dialects.partial_json import partial_object
from helexa.core.errors import BadRequest

SMALL, LARGE = 2_500_000, 10_000_000  # bytes
FACTOR = LARGE / SMALL
USER = {"role": "user", "content": "x"}
FUNCTION = {"name": "f", "parameters": {}}


def anthropic(**fields: Any) -> None:
    anthropic_request.translate(encoded({"max_tokens": 9, "messages": [USER], **fields}))


def responses(**fields: Any) -> None:
    body = encoded({"input": "x", **fields})
    responses_request.translate(responses_request.read(body), body)


def ollama(**fields: Any) -> None:
    ollama_request.chat(encoded({"messages": [USER], **fields}))


def encoded(fields: dict[str, Any]) -> bytes:
    return msgspec.json.encode(fields)


def repeated(entry: Any, size: int) -> list[Any]:
    """So many that they are `size` bytes together."""
    return [entry] * (size // (len(encoded(entry)) + 1))


def blocks_of_a_turn(size: int) -> None:
    anthropic(messages=[{"role": "user", "content": repeated({"type": "text", "text": ""}, size)}])


def results_beside_texts(size: int) -> None:
    pair = [{"type": "tool_result", "tool_use_id": "a", "is_error": True}, {"type": "text", "text": "x"}]
    anthropic(messages=[{"role": "user", "content": [block for two in repeated(pair, size) for block in two]}])


def thoughts_in_many_turns(size: int) -> None:
    thoughts = repeated({"type": "thinking", "thinking": "hm"}, size // (MAX_MESSAGES // 2))
    turns = [USER, {"role": "assistant", "content": thoughts}] * (MAX_MESSAGES // 2)
    anthropic(messages=turns, context_management={"edits": [{"type": "clear_thinking_20251015"}]})


def items_with_parts(size: int) -> None:
    parts = repeated({"type": "input_text", "text": ""}, size // 1000)
    responses(input=[{"role": "user", "content": parts}] * 1000)


def tools_among_the_items(size: int) -> None:
    count = size // 60_000  # of items, each with MAX_TOOLS tools of about 60 bytes
    tools = [
        [{"type": "function", "name": f"f{i}t{j}", "parameters": {}} for j in range(MAX_TOOLS)] for i in range(count)
    ]
    responses(input=[USER, *({"type": "additional_tools", "tools": listed} for listed in tools)])


def _grown(size: int) -> int:
    """Results: as many as there may be in the large body, and their share in the small one."""
    return (MAX_MESSAGES - 2) * size // LARGE


def results_that_name_calls_from_the_end(size: int) -> None:
    calls = [{"id": f"call{i:07d}", "function": {"name": "f", "arguments": {}}} for i in range(size // 60)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in reversed(calls)]
    ollama(messages=[USER, {"role": "assistant", "tool_calls": calls}, *results[: _grown(size)]])


def results_that_name_nothing_after_all_were_named(size: int) -> None:
    calls = [{"id": f"call{i:07d}", "function": {"name": "f", "arguments": {}}} for i in range(size // 60)]
    named = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in calls[: _grown(size) // 2]]
    unnamed = [{"role": "tool", "content": "x"}] * (_grown(size) // 2)
    ollama(messages=[USER, {"role": "assistant", "tool_calls": calls}, *named, *unnamed])


def arguments_nested_without_end(size: int) -> None:
    partial_object('{"a":' + "[" * size)


def arguments_of_many_members(size: int) -> None:
    partial_object('{"a":[' + "[1]," * (size // 4))


def cpu_s(work: Callable[[int], None], size: int) -> float:
    began = time.process_time()
    work(size)
    return time.process_time() - began


@pytest.mark.parametrize(
    "work",
    [
        blocks_of_a_turn,
        results_beside_texts,
        thoughts_in_many_turns,
        items_with_parts,
        tools_among_the_items,
        results_that_name_calls_from_the_end,
        results_that_name_nothing_after_all_were_named,
        arguments_nested_without_end,
        arguments_of_many_members,
    ],
)
def test_ten_megabytes_cost_no_more_than_their_share(work: Callable[[int], None]) -> None:
    """Four times the bytes: four times the work, sixteen times where it is quadratic."""
    gc.collect()
    gc.disable()  # its own cost grows as it likes
    try:
        work(SMALL // 10)  # what is made once
        small = min(cpu_s(work, SMALL) for _ in range(2))
        assert cpu_s(work, LARGE) < small * FACTOR * 2
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("ask", "field", "entry", "most"),
    [
        (anthropic, "messages", USER, MAX_MESSAGES),
        (anthropic, "tools", {"name": "f", "input_schema": {}}, MAX_TOOLS),
        (responses, "input", USER, MAX_MESSAGES),
        (responses, "tools", {"type": "web_search"}, MAX_TOOLS),
        (ollama, "messages", USER, MAX_MESSAGES),
        (ollama, "tools", {"type": "function", "function": FUNCTION}, MAX_TOOLS),
    ],
)
def test_a_list_that_is_too_long_is_refused_by_its_name(
    ask: Callable[..., None], field: str, entry: dict[str, Any], most: int
) -> None:
    ask(**{field: [entry] * most})
    with pytest.raises(BadRequest, match=f"{most}") as caught:
        ask(**{field: [entry] * (most + 1)})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "where", [b'"messages": [{"role": "user", "content": "\xff"}]', b'"messages": [], "unknown": "\xff"']
)
def test_a_body_that_is_no_utf_8_is_refused_wherever_the_fault_stands(where: bytes) -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        anthropic_request.translate(b'{"max_tokens": 9, ' + where + b"}")
