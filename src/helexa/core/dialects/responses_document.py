"""The response object: what it says from its beginning on, and what comes to it at its end. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from helexa.core.dialects import neuron_chat as chat
from helexa.core.errors import BadRequest, ContextLengthExceeded, HelexaError, RateLimited

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Document:
    """key:           its own part of all ids: resp_KEY, msg_KEYo0
    echo:          members that repeat the request; no braces, no comma at either end
    clock:         seconds since 1970
    show_summary, seal: as in responses_request.Translation
    """

    key: str
    model: str
    created_at: int
    echo: bytes
    clock: Callable[[], float]
    show_summary: bool = False
    seal: bool = False

    @property
    def id(self) -> str:
        return f"resp_{self.key}"

    def render(
        self,
        status: str,
        output: Sequence[bytes],
        *,
        usage: chat.Usage | None = None,
        incomplete: str | None = None,
        error: dict[str, Any] | None = None,
    ) -> bytes:
        """output: items as JSON.   incomplete: the reason."""
        state: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "model": self.model,
            "status": status,
            "completed_at": int(self.clock()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": incomplete} if incomplete is not None else None,
        }
        if usage is not None:  # OpenAI's description has no null here
            state["usage"] = _usage(usage)
        return b'%b,%b,"output":[%b]}' % (_encode(state)[:-1], self.echo, b",".join(output))


def error_code(error: HelexaError) -> str:
    """Of a response that failed. Codex tells by it whether to try again; context_length_exceeded is not among OpenAI's
    published codes, and is what it sends."""
    if error.code == ContextLengthExceeded.code:
        return error.code
    if isinstance(error, RateLimited):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, BadRequest) else "server_error"


def _usage(usage: chat.Usage) -> dict[str, Any]:
    """Nobody is billed for writing to our cache: it is 0, not unknown."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
