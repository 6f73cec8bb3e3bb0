"""Hypothesis strategies for Anthropic's dialect: whole conversations as clients send them, and whole answers as a
neuron streams them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# No surrogates: neither JSON libraries nor engines send half a character.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
NAME = st.text("abcdefghijklmnopqrstuvwxyz_-0123456789", min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
CACHE = st.just({"cache_control": {"type": "ephemeral"}}) | st.just({})
PIXEL = "iVBORw0KGgo="


def _block(kind: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    made = st.fixed_dictionaries({"type": st.just(kind), **fields})
    return st.tuples(made, CACHE).map(lambda pair: pair[0] | pair[1])


TEXT_BLOCK = _block("text", text=TEXT)
IMAGE = _block(
    "image",
    source=st.just({"type": "base64", "media_type": "image/png", "data": PIXEL}),
)
DOCUMENT = _block(
    "document",
    source=st.fixed_dictionaries({"type": st.just("text"), "media_type": st.just("text/plain"), "data": TEXT}),
    title=st.none() | TEXT,
)
RESULT_CONTENT = TEXT | st.lists(TEXT_BLOCK | IMAGE | DOCUMENT, max_size=3)
THOUGHT = _block("thinking", thinking=TEXT, signature=st.sampled_from(["hx1.msg_1", "", "EqQBCkgIARAB"]))
REDACTED = _block("redacted_thinking", data=SAID)


@st.composite
def tools(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(NAME, unique=True, max_size=3))
    return [
        {
            "name": name,
            "description": draw(TEXT),
            "input_schema": {"type": "object", "properties": {key: {} for key in draw(st.lists(NAME, max_size=2))}},
            **draw(CACHE),
        }
        for name in names
    ]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A whole body of POST /v1/messages: turns by turns, each call answered in the next user turn."""
    given_tools = draw(tools())
    body: dict[str, Any] = {"model": "any", "max_tokens": draw(st.integers(1, 100_000)), "messages": []}
    if draw(st.booleans()):
        body["system"] = draw(SAID | st.lists(TEXT_BLOCK, min_size=1, max_size=3))
    if given_tools:
        body["tools"] = given_tools
        body["tool_choice"] = {"type": draw(st.sampled_from(["auto", "any", "none"]))}
    body |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0, 1),
                "top_p": st.floats(0, 1),
                "top_k": st.integers(0, 500),
                "stop_sequences": st.lists(SAID, max_size=4),
                "stream": st.booleans(),
                "metadata": st.fixed_dictionaries({"user_id": st.none() | SAID}),
                "thinking": st.sampled_from(
                    [{"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2000}]
                ),
            },
        )
    )
    open_calls: list[str] = []
    numbers = iter(range(1000))
    for _ in range(draw(st.integers(1, 4))):
        said = draw(st.lists(TEXT_BLOCK | IMAGE | DOCUMENT, min_size=0 if open_calls else 1, max_size=3))
        results = [
            {
                "type": "tool_result",
                "tool_use_id": call,
                "content": draw(RESULT_CONTENT),
                "is_error": draw(st.booleans()),
            }
            for call in open_calls
        ]
        body["messages"].append({"role": "user", "content": results + said})
        open_calls = []
        if draw(st.booleans()):
            body["messages"].append({"role": "system", "content": draw(SAID)})
        blocks = draw(st.lists(THOUGHT | REDACTED, max_size=2)) + draw(st.lists(TEXT_BLOCK, max_size=2))
        for tool in draw(st.lists(st.sampled_from(given_tools), max_size=2)) if given_tools else []:
            open_calls.append(f"toolu_{next(numbers)}")
            blocks.append({"type": "tool_use", "id": open_calls[-1], "name": tool["name"], "input": draw(OBJECT)})
        body["messages"].append({"role": "assistant", "content": blocks})
    return body


@dataclass(frozen=True)
class Streamed:
    """A neuron's stream, and what it says in all."""

    data: bytes
    pieces: list[tuple[str, Any]]  # ("reasoning", text) | ("text", text) | ("call", (id, name, arguments))
    finish_reason: str


def _event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"object": "chat.completion.chunk", **fields}).encode() + b"\n\n"


def _delta(finish_reason: str | None = None, stop_reason: str | None = None, **delta: Any) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    if stop_reason is not None:
        choice["stop_reason"] = stop_reason
    return _event(choices=[choice])


@st.composite
def _cut(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def answers(draw: st.DrawFn, *, whole_calls: bool = False) -> Streamed:
    """whole_calls: no call is cut off by the token limit."""
    pieces: list[tuple[str, Any]] = []
    out = [_delta(role="assistant", content=None)]
    if draw(st.booleans()):
        out.insert(0, _event(choices=[], prompt_progress={"total": 9, "cache": 4, "processed": 4, "time_ms": 0}))
    for number, kind in enumerate(draw(st.lists(st.sampled_from(["reasoning", "text", "call"]), max_size=4))):
        if kind == "call":
            pieces.append(("call", (f"call_{number}", draw(NAME), json.dumps(draw(OBJECT)))))
        elif pieces and pieces[-1][0] == kind:
            continue
        else:
            pieces.append((kind, draw(SAID)))
    finish = "tool_calls" if any(kind == "call" for kind, _ in pieces) else "stop"
    if draw(st.booleans()):
        finish = "length"
        if pieces and pieces[-1][0] == "call" and not whole_calls:
            call_id, name, arguments = pieces[-1][1]
            pieces[-1] = ("call", (call_id, name, arguments[: draw(st.integers(0, len(arguments)))]))
    calls = iter(range(10))
    for kind, what in pieces:
        if kind == "call":
            call_id, name, arguments = what
            index = next(calls)
            first = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
            out.append(_delta(tool_calls=[first]))
            out += [
                _delta(tool_calls=[{"index": index, "function": {"arguments": part}}]) for part in draw(_cut(arguments))
            ]
        else:
            field = "content" if kind == "text" else "reasoning_content"
            out += [_delta(**{field: part}) for part in draw(_cut(what))]
    out.append(_delta(finish, draw(st.none() | SAID) if finish == "stop" else None))
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    out += [_event(choices=[], usage=usage), b"data: [DONE]\n\n"]
    if draw(st.booleans()):
        out.insert(draw(st.integers(0, len(out))), b": still here\n\n")
    return Streamed(b"".join(out), pieces, finish)
