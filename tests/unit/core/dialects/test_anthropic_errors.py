"""What a node refuses, in Anthropic's words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helexa.core.dialects.anthropic_errors import naming
from helexa.core.dialects.node_errors import from_answer as from_node
from helexa.core.errors import Dialect, HelexaError, render, status_for


def from_answer(status: int, body: bytes) -> HelexaError:
    return from_node(status, body, naming)


def told(status: int, body: bytes) -> tuple[int, str, str]:
    error = from_answer(status, body)
    inner = json.loads(render(error, Dialect.ANTHROPIC, "r"))["error"]
    return status_for(error, Dialect.ANTHROPIC), inner["type"], inner["message"]


def envelope(**error: Any) -> bytes:
    return json.dumps({"error": {"type": "x", "param": None, **error}}).encode()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_request_error", (400, "invalid_request_error")),
        (400, "unsupported_modality", (400, "invalid_request_error")),
        (400, "wrong_task", (400, "invalid_request_error")),
        (404, "model_not_found", (404, "not_found_error")),
        (413, "request_too_large", (413, "request_too_large")),
        (422, "template_failed", (422, "invalid_request_error")),
        (429, "rate_limit_exceeded", (429, "rate_limit_error")),
        (503, "overloaded", (529, "overloaded_error")),
        (503, "model_loading", (529, "overloaded_error")),
        (503, "no_node", (503, "api_error")),
        (502, "upstream_error", (502, "api_error")),
        (504, "upstream_timeout", (504, "timeout_error")),
        (418, "teapot", (400, "invalid_request_error")),
        (500, None, (502, "api_error")),
    ],
)
def test_each_condition_has_its_status_and_type(status: int, code: str | None, expected: tuple[int, str]) -> None:
    assert told(status, envelope(code=code, message="why")) == (*expected, "why")


def test_a_prompt_that_is_too_long_is_told_in_the_phrase_that_clients_look_for() -> None:
    body = envelope(code="context_length_exceeded", message="x", n_prompt_tokens=3031, n_ctx=1024)
    assert told(400, body) == (400, "invalid_request_error", "prompt is too long: 3031 tokens > 1024 maximum")
    vague = envelope(code="context_length_exceeded", message="too long")
    assert told(400, vague) == (400, "invalid_request_error", "too long")


@pytest.mark.parametrize(
    ("param", "name"),
    [
        ("stop", "stop_sequences"),
        ("tools[2].function.parameters.type", "tools.2.input_schema"),
        ("tools[0].function.name", "tools.0.name"),
        ("temperature", "temperature"),
    ],
)
def test_a_field_is_named_as_the_client_knows_it(param: str, name: str) -> None:
    body = envelope(code="invalid_request_error", message=f"`{param}` is wrong.", param=param)
    assert told(400, body)[2] == f"`{name}` is wrong."


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":"x"}', b'{"error":null}', b"\xff", b'{"error":{}}'])
def test_any_body_is_an_error(body: bytes) -> None:
    assert isinstance(from_answer(500, body), HelexaError)
    assert told(500, body)[0] == 502


def test_details_stay() -> None:
    body = envelope(code="model_loading", message="x", loading={"state": "loading", "progress": 0.4})
    inner = json.loads(render(from_answer(503, body), Dialect.ANTHROPIC, "r"))["error"]
    assert inner["loading"] == {"state": "loading", "progress": 0.4}
