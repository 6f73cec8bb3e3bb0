"""Tools for a model whose chat template cannot show them: told in the system message, calls and results as text. Pure.

Such a template drops `tools`, `tool_calls` and the role `tool` without a word, and the model answers as if there were
none. Here they reach it; what it writes is read back by each harness. Only messages of such requests are rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from helexa.neuron.harness.openai_fields import ChatRequest, Tool, called_function

_HOW = 'To call a function, answer with one JSON object and nothing else: {"name": <function>, "arguments": <object>}.'


def needs_text(chat: ChatRequest) -> bool:
    """Something in this request would be lost without a template that knows tools."""
    return bool(chat.tools) or any(m.tool_calls or m.role == "tool" for m in chat.messages or ())


def messages_with_tools(raw: bytes, chat: ChatRequest) -> bytes:
    """The `messages` of a request, as its raw JSON, with everything about tools told as text."""
    messages: list[dict[str, Any]] = msgspec.json.decode(raw)
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.get("tool_calls"):
            told.append(_told_calls(message, names))
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id") or "", "the function")
            text = f"{name} returned: {_text(message.get('content'))}"
            if told and told[-1]["role"] == "tool":
                told[-1]["content"] += "\n" + text
            else:
                told.append({"role": "tool", "content": text})
        else:
            told.append(message)
    for message in told:  # several results stand together: templates want user and assistant by turns
        if message["role"] == "tool":
            message["role"] = "user"
    if chat.tools and chat.tool_choice != "none":
        _describe(told, _description(chat.tools, chat))
    return msgspec.json.encode(told)


def _told_calls(message: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    lines = [text] if (text := _text(message.get("content"))) else []
    for call in message["tool_calls"]:
        function = call["function"]
        names[call.get("id") or ""] = function["name"]
        arguments = function.get("arguments") or "{}"
        written = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        lines.append(f'{{"name": "{function["name"]}", "arguments": {written}}}')
    return {"role": "assistant", "content": "\n".join(lines)}


def _description(tools: Sequence[Tool], chat: ChatRequest) -> str:
    functions = [
        msgspec.json.encode(
            {
                "name": f.name,
                **({"description": f.description} if f.description else {}),
                "parameters": f.schema or {},
            }
        ).decode()
        for tool in tools
        if (f := tool.function) is not None
    ]
    forced = called_function(chat)
    duty = (
        f"Call {forced} now."
        if forced
        else "Call one of them now."
        if chat.forced_tool
        else "Otherwise answer in text."
    )
    return "\n".join(["You can call these functions:", *functions, f"{_HOW} {duty}"])


def _describe(messages: list[dict[str, Any]], text: str) -> None:
    """Put `text` at the end of the system message; only a template's first message may be one."""
    if messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": text})
        return
    content = messages[0].get("content")
    if isinstance(content, list):
        messages[0]["content"] = [*content, {"type": "text", "text": text}]
    else:
        messages[0]["content"] = f"{content}\n\n{text}" if content else text


def _text(content: Any) -> str:
    """A message's content as text; parts that are none are left out (a tool's result is text)."""
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content if part.get("type") == "text")
    return content or ""
