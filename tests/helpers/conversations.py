"""Conversations as a chat template gets them, and the templates under tests/fixtures: the shapes of model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

TEMPLATES: Final = Path(__file__).parents[1] / "fixtures" / "templates"
SPECIAL: Final = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The <b>weather</b> & "more", é 🌦',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "integer", "enum": [1, 2, 7]},
                "places": {"type": "array", "items": {"type": "object", "properties": {"lat": {"type": "number"}}}},
                "unit": {"type": ["string", "null"], "default": None},
            },
            "required": ["city"],
        },
    },
}


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8")


def user(content: Any = "Hi <there> & 'you'") -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(arguments: dict[str, Any], call_id: str = "abcdefgh1", name: str = "get_weather") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def called(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **more}


def result(content: str, call_id: str = "abcdefgh1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# name -> messages, tools, further variables
CONVERSATIONS: Final[dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]]] = {
    "a question": ([user()], None, {}),
    "a system message": (
        [
            {"role": "system", "content": "Be brief: é\n"},
            user(),
            {"role": "assistant", "content": "Yo"},
            user(" more \n"),
        ],
        None,
        {},
    ),
    "a developer": ([{"role": "developer", "content": "Be brief."}, user()], None, {}),
    "no thinking": ([user()], None, {"enable_thinking": False, "reasoning_effort": "low"}),
    "thoughts": (
        [user(), {"role": "assistant", "content": "Yo", "reasoning_content": "hm <x>"}, user("and?")],
        None,
        {"enable_thinking": True},
    ),
    "thoughts in the text": (
        [user(), {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo"}, user("and?")],
        None,
        {},
    ),
    "tools": ([{"role": "system", "content": "S"}, user()], [TOOL], {}),
    "no tools": ([user()], [], {}),
    "a call": ([user(), called(call({"city": "Zürich"}), content=None, reasoning_content="ask")], [TOOL], {}),
    "a result": (
        [user(), called(call({"city": "Zürich", "places": [{"lat": 1.5}]})), result('{"t": 3}')],
        [TOOL],
        {"enable_thinking": False},
    ),
    "two calls": (
        [
            user(),
            called(call({"city": "A"}), call({"city": "B & C"}, "abcdefgh2")),
            result("3"),
            result("4", "abcdefgh2"),
            {"role": "assistant", "content": "3 and 4"},
            user("thanks"),
        ],
        [TOOL],
        {},
    ),
    "parts": ([user([{"type": "text", "text": "Look"}, {"type": "text", "text": " here"}])], None, {}),
    "the user twice": ([user(), user()], None, {}),
}
