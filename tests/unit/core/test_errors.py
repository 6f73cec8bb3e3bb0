"""The error table of the HTTP contract, row by row, in every dialect."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.core import errors
from helexa.core.errors import Dialect, HelexaError, nearest, render, render_event, status_for

ROWS: list[tuple[type[HelexaError], int, str, int, str, bool]] = [
    (errors.BadRequest, 400, "invalid_request_error", 400, "invalid_request_error", False),
    (errors.UnsupportedModality, 400, "unsupported_modality", 400, "invalid_request_error", False),
    (errors.InvalidApiKey, 401, "invalid_api_key", 401, "authentication_error", False),
    (errors.PermissionDenied, 403, "permission_denied", 403, "permission_error", False),
    (errors.WrongTask, 400, "wrong_task", 400, "invalid_request_error", False),
    (errors.ModelNotFound, 404, "model_not_found", 404, "not_found_error", False),
    (errors.ModelNotServable, 404, "model_not_servable", 404, "not_found_error", False),
    (errors.RequestTooLarge, 413, "request_too_large", 413, "request_too_large", False),
    (errors.RateLimited, 429, "rate_limit_exceeded", 429, "rate_limit_error", False),
    (errors.Overloaded, 503, "overloaded", 529, "overloaded_error", True),
    (errors.ModelLoading, 503, "model_loading", 529, "overloaded_error", True),
    (errors.NoNode, 503, "no_node", 503, "api_error", True),
    (errors.LoadFailed, 503, "load_failed", 503, "api_error", True),
    (errors.ShuttingDown, 503, "shutting_down", 503, "api_error", True),
    (errors.UpstreamError, 502, "upstream_error", 502, "api_error", False),
    (errors.UpstreamTimeout, 504, "upstream_timeout", 504, "timeout_error", False),
]


@pytest.mark.parametrize(("cls", "status", "code", "anthropic_status", "anthropic_type", "retries"), ROWS)
def test_each_condition_has_the_status_and_words_of_the_table(
    cls: type[HelexaError], status: int, code: str, anthropic_status: int, anthropic_type: str, retries: bool
) -> None:
    error = cls("what was wrong")
    openai = json.loads(render(error, Dialect.OPENAI, "r1"))["error"]
    anthropic = json.loads(render(error, Dialect.ANTHROPIC, "r1"))
    assert status_for(error, Dialect.OPENAI) == status
    assert openai["code"] == code
    assert set(openai) == {"message", "type", "param", "code"}
    assert status_for(error, Dialect.ANTHROPIC) == anthropic_status
    assert anthropic == {
        "type": "error",
        "error": {"type": anthropic_type, "message": "what was wrong"},
        "request_id": "r1",
    }
    assert json.loads(render(error, Dialect.OLLAMA, "r1")) == {"error": "what was wrong"}
    assert (error.retry_after_s is not None) is retries


def test_a_prompt_over_the_context_is_told_in_each_dialects_own_phrase_with_both_figures() -> None:
    error = errors.ContextLengthExceeded("qwen", 5031, 2048)
    openai = json.loads(render(error, Dialect.OPENAI, "r"))["error"]
    assert openai["code"] == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in openai["message"]
    assert "5031" in openai["message"]
    anthropic = json.loads(render(error, Dialect.ANTHROPIC, "r"))["error"]
    assert anthropic["message"] == "prompt is too long: 5031 tokens > 2048 maximum"


def test_a_code_given_to_one_instance_does_not_change_the_class() -> None:
    assert errors.Conflict("no room", code="insufficient_memory").code == "insufficient_memory"
    assert errors.Conflict("busy").code == "conflict"


@given(message=st.text(), param=st.none() | st.text(), dialect=st.sampled_from(Dialect))
def test_an_error_event_is_one_event_whatever_the_message_holds(
    message: str, param: str | None, dialect: Dialect
) -> None:
    message = message.encode("utf-8", "replace").decode()
    event = render_event(errors.BadRequest(message, param=None if param is None else repr(param)), dialect, "r")
    ending = b"\n" if dialect is Dialect.OLLAMA else b"\n\n"
    assert event.endswith(ending)
    assert ending not in event[: -len(ending)]
    assert b"[DONE]" not in event or "[DONE]" in message


def test_the_nearest_names_are_offered_whatever_their_case() -> None:
    assert nearest("qwen3-8b", ["Qwen3-8B", "Llama-3", "Qwen3-32B"])[0] == "Qwen3-8B"
    assert nearest("zzzz", ["Qwen3-8B"]) == []
