"""What the engine's own errors mean: whose fault, which field, what to do. Pure.

llama.cpp answers {"error": {"code": 400, "message": ..., "type": ...}}, with the fault in words alone, and takes some
of the caller's mistakes for its own (500). The table holds what version 2026.10 was seen to say.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from helexa.core.bodies import try_decode
from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    Overloaded,
    UnsupportedModality,
    UpstreamError,
    WrongTask,
)
from helexa.neuron.harness import template_refusals

# Where a prompt stands in a body, by the last part of the path.
_PROMPT: Final = {"completions": "messages", "embeddings": "input", "rerank": "documents"}
_TOO_LARGE: Final = re.compile(r"\((\d+) tokens\) (?:is too large to process|exceeds).*?(\d+)(?: tokens)?\)", re.DOTALL)
_FIELD: Final = re.compile(r"Field '([^']+)': (.*)", re.DOTALL)
# What no caller can use: the JSON library's name for the error, and which of its parts could not do the work.
_INSIDE: Final = re.compile(
    r"\[json\.exception\.[a-z_]+\.\d+\] |Unable to generate parser for this template\. "
    r"(?:Automatic parser generation failed: )?|Failed to initialize samplers: "
)
_RAISED: Final = re.compile(r"Jinja Exception: (.*)")  # by the template, on purpose; after a picture of its source

# (what the message contains, the field at fault); the first that fits.
_CALLERS: Final[tuple[tuple[str, str | None], ...]] = (
    ("tool call arguments", "messages"),
    ("Failed to parse tools", "tools"),
    ("tool_choice", "tool_choice"),
    ("JSON schema", "response_format"),
    ('"json_schema"', "json_schema"),
    ("response_format", "response_format"),
    ("grammar", "grammar"),
    ("Jinja", "messages"),
    ("template", "messages"),
    ("messages", "messages"),
    ("content", "messages"),
    ("prompt", "prompt"),
)


class _Error(msgspec.Struct):
    message: str = ""
    type: str = ""
    code: int | str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Envelope(msgspec.Struct):
    error: _Error


class _Asked(msgspec.Struct):
    tools: list[msgspec.Raw] | None = None


_decode = msgspec.json.Decoder(_Envelope).decode
_asked = msgspec.json.Decoder(_Asked)


def translate(model: str, path: str, status: int, body: bytes, asked: bytes = b"") -> HelexaError:
    """The error that the client gets for the engine's `status` and `body`.   asked: the request's own body."""
    try:
        error = _decode(body).error
    except msgspec.MsgspecError:
        return UpstreamError(f"{model}: the engine answered {status} {body[:200].decode('utf-8', 'replace')!r}")
    code = error.code if isinstance(error.code, int) else status
    message = _INSIDE.sub("", error.message)
    if (raised := _RAISED.search(message)) is not None:
        wanted = try_decode(_asked, asked)
        with_tools = wanted is not None and bool(wanted.tools)
        return template_refusals.refusal(model, raised.group(1), with_tools=with_tools)
    if (sizes := _sizes(error)) is not None:
        too_long = ContextLengthExceeded(model, *sizes)
        too_long.param = "prompt" if path == "/v1/completions" else _PROMPT.get(path.rsplit("/", 1)[-1], "messages")
        return too_long
    if "input is not supported" in message:
        return UnsupportedModality(f"{model}: {message}", param="messages")
    if error.type == "not_supported_error":
        return WrongTask(f"{model} does not answer {path}: {message}", param="model")
    if error.type == "unavailable_error":
        return Overloaded(f"{model}: {message}", retry_after_s=1)
    if error.type == "invalid_request_error" or code == 400:
        return _bad_request(message)
    if code == 500 and _is_callers(message):
        return _bad_request(message)
    return UpstreamError(f"{model}: the engine failed: {message or f'status {code}'}")


def _sizes(error: _Error) -> tuple[int, int] | None:
    """Prompt tokens and what fits."""
    if error.n_prompt_tokens is not None and error.n_ctx is not None:
        return error.n_prompt_tokens, error.n_ctx
    found = _TOO_LARGE.search(error.message)
    return (int(found.group(1)), int(found.group(2))) if found is not None else None


def _is_callers(message: str) -> bool:
    """The engine says 500 also where the request made it fail: a template that raised, arguments that are no JSON."""
    return any(sign in message for sign in ("Failed to parse tools", "tool call arguments", "Jinja", "template"))


def _bad_request(message: str) -> BadRequest:
    if (found := _FIELD.match(message)) is not None:
        return BadRequest(f"`{found.group(1)}`: {found.group(2)}", param=found.group(1))
    param = next((field for sign, field in _CALLERS if sign in message), None)
    return BadRequest(message, param=param)
