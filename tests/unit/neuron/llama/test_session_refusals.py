"""The engine's own errors, as it was seen to write them, in our taxonomy."""

from __future__ import annotations

import json

import pytest
from tests.helpers.exchanges import CHAT, COMPLETIONS, exchange, session

from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    Overloaded,
    UnsupportedModality,
    UpstreamError,
    WrongTask,
)


def refusal(code: int, message: str, kind: str = "invalid_request_error", path: str = CHAT, **more: int) -> HelexaError:
    body = json.dumps({"error": {"code": code, "message": message, "type": kind, **more}}).encode()
    error = session().refusal(exchange(b"{}", path), code, body)
    assert error is not None
    return error


@pytest.mark.parametrize("tools", [None, [], [{"type": "function"}]])
def test_a_template_that_refuses_is_told_with_its_rule_and_with_tools_as_a_422(tools: list[object] | None) -> None:
    told = {"code": 500, "message": "\n---\nError: Jinja Exception: Roles must alternate!", "type": "server_error"}
    body = json.dumps({"messages": [], "tools": tools}).encode()
    error = session().refusal(exchange(body, CHAT), 500, json.dumps({"error": told}).encode())
    assert error is not None
    assert (error.status, error.param) == (422 if tools else 400, "messages")
    assert "Roles must alternate! (it takes messages of the user and of the assistant by turns" in error.message


@pytest.mark.parametrize(
    ("path", "param"),
    [(CHAT, "messages"), (COMPLETIONS, "prompt"), ("/v1/embeddings", "input"), ("/v1/rerank", "documents")],
)
def test_a_prompt_over_the_context_bears_both_figures_and_its_field(path: str, param: str) -> None:
    text = "request (3031 tokens) exceeds the available context size (2048 tokens), try increasing it"
    error = refusal(400, text, "exceed_context_size_error", path, n_prompt_tokens=3031, n_ctx=2048)
    assert isinstance(error, ContextLengthExceeded)
    assert error.details == {"n_prompt_tokens": 3031, "n_ctx": 2048}
    assert error.param == param


def test_an_input_over_the_batch_is_an_input_too_long() -> None:
    text = "input (501 tokens) is too large to process. increase the physical batch size (current batch size: 128)"
    error = refusal(500, text, "server_error", "/v1/embeddings")
    assert isinstance(error, ContextLengthExceeded)
    assert error.details == {"n_prompt_tokens": 501, "n_ctx": 128}


@pytest.mark.parametrize(
    ("code", "message", "param"),
    [
        (400, "Field 'seed': [json.exception.type_error.302] type must be number, but is string", "seed"),
        (400, "Expected 'content' to be a string or an array", "messages"),
        (400, "All non-assistant messages must contain 'content'", "messages"),
        (400, "Failed to initialize samplers: failed to parse grammar", "grammar"),
        (
            400,
            "Unable to generate parser for this template. JSON schema error at #: unrecognized type foo",
            "response_format",
        ),
        (400, '"prompt" must not be empty', "prompt"),
        (500, 'Failed to parse tools: Missing tool function: {"type":"function"}', "tools"),
        (500, "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error", "messages"),
        (500, "Jinja Exception: Conversation roles must alternate user/assistant", "messages"),
    ],
)
def test_a_callers_mistake_is_400_and_names_the_field(code: int, message: str, param: str) -> None:
    error = refusal(code, message, "server_error" if code == 500 else "invalid_request_error")
    assert type(error) is BadRequest
    assert error.param == param
    assert "json.exception" not in error.message
    assert "parser" not in error.message


def test_a_template_that_raised_is_quoted_without_its_source() -> None:
    source = (
        "\n------------\nWhile executing CallExpression at line 3, column 228 in source:\n...{{ raise_exception(...\n"
    )
    error = refusal(400, source + "Error: Jinja Exception: Conversation roles must alternate user/assistant")
    said = "smol: its chat template refuses these messages: Conversation roles must alternate user/assistant (it takes"
    assert error.message.startswith(said)
    assert "CallExpression" not in error.message


@pytest.mark.parametrize(
    ("code", "message", "kind", "expected"),
    [
        (
            500,
            "image input is not supported - hint: you may need to provide the mmproj",
            "server_error",
            UnsupportedModality,
        ),
        (
            501,
            "This server does not support embeddings. Start it with `--embeddings`",
            "not_supported_error",
            WrongTask,
        ),
        (503, "Loading model", "unavailable_error", Overloaded),
        (500, "Compute error.", "server_error", UpstreamError),
        (401, "Invalid API Key", "authentication_error", UpstreamError),
        (404, "File Not Found", "not_found_error", UpstreamError),
    ],
)
def test_each_other_error_has_its_class(code: int, message: str, kind: str, expected: type[HelexaError]) -> None:
    assert type(refusal(code, message, kind)) is expected


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"error":"x"}'])
def test_what_is_no_error_of_the_engine_is_its_failure(body: bytes) -> None:
    assert isinstance(session().refusal(exchange(b"{}"), 500, body), UpstreamError)
