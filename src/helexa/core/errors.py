"""One error taxonomy for both programs, and the one place that renders it in each dialect.

A class says whose fault it is and what should happen next; the table of CONTRACTS (docs/reference/errors.md) is
written here once, as class attributes. A message says what was wrong, which model or node, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import msgspec


class Dialect(Enum):
    """Which envelope a path's clients expect."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


class HelexaError(Exception):
    """Something to tell the caller. Raised where it is found, rendered where the request ends.

    param:          the request's field at fault, where there is one
    retry_after_s:  whole seconds for `retry-after`; only for errors where trying again is right
    details:        further members of the error object (need_mb, loading, ...), the same in each dialect
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"  # of the class, but for a few whose code comes with the instance
    anthropic_status: ClassVar[int] = 500
    anthropic_type: ClassVar[str] = "api_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.details: dict[str, Any] = dict(details or {})


class BadRequest(HelexaError):
    """The body or a field is wrong; sending it again will fail again."""

    status = anthropic_status = 400
    type = anthropic_type = "invalid_request_error"
    code = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    """The prompt cannot fit the model's context; both figures are in the message, in each dialect's own phrase."""

    code = "context_length_exceeded"

    def __init__(self, model: str, prompt_tokens: int, context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, your prompt has {prompt_tokens} "
            f"tokens ({model}). Shorten the prompt, or load the model with a larger context.",
            param="messages",
            details={"n_prompt_tokens": prompt_tokens, "n_ctx": context},
        )
        self.anthropic_message = f"prompt is too long: {prompt_tokens} tokens > {context} maximum"


class PreviousResponseNotFound(BadRequest):
    """What `previous_response_id` names is kept no longer; the whole conversation has to be sent."""

    code = "previous_response_not_found"


class UnsupportedModality(BadRequest):
    """An image, or another part, for a model that cannot take it."""

    code = "unsupported_modality"


class WrongTask(BadRequest):
    """A chat for an embedding model, and the like."""

    code = "wrong_task"


class InvalidApiKey(HelexaError):
    """No key, or one that nobody knows."""

    status = anthropic_status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    anthropic_type = "authentication_error"


class PermissionDenied(HelexaError):
    """Known, and not allowed."""

    status = anthropic_status = 403
    type = "invalid_request_error"
    code = "permission_denied"
    anthropic_type = "permission_error"


class NotFound(HelexaError):
    """No such path or resource."""

    status = anthropic_status = 404
    type = "invalid_request_error"
    code = "not_found"
    anthropic_type = "not_found_error"


class ModelNotFound(NotFound):
    """Nobody knows this name. The message lists the nearest names."""

    code = "model_not_found"


class ModelNotServable(NotFound):
    """Known, but no node could ever hold it: waiting does not help."""

    code = "model_not_servable"


class MethodNotAllowed(HelexaError):
    """The path exists, with another method."""

    status = anthropic_status = 405
    type = anthropic_type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(HelexaError):
    """The state does not allow it now (in use, loaded differently). `code` comes with the instance."""

    status = anthropic_status = 409
    type = anthropic_type = "invalid_request_error"
    code = "conflict"

    def __init__(self, message: str, *, code: str = "conflict", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, details=details)
        self.code = code


class RequestTooLarge(HelexaError):
    """The body is over the limit."""

    status = anthropic_status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    anthropic_type = "request_too_large"


class HeadTooLarge(HelexaError):
    """A request's head over the limit of bytes or headers."""

    status = anthropic_status = 431
    type = anthropic_type = "invalid_request_error"
    code = "head_too_large"


class VersionNotSupported(HelexaError):
    """HTTP/0.9, HTTP/2 without negotiation, or a 1.1 feature in 1.0."""

    status = anthropic_status = 505
    type = anthropic_type = "invalid_request_error"
    code = "http_version_not_supported"


class RequestTimeout(HelexaError):
    """The client did not send its head or body in time."""

    status = anthropic_status = 408
    type = anthropic_type = "invalid_request_error"
    code = "request_timeout"


class UnsupportedMedia(HelexaError):
    """A compressed body, or not JSON."""

    status = anthropic_status = 415
    type = anthropic_type = "invalid_request_error"
    code = "unsupported_media_type"


class NeverLoads(HelexaError):
    """The load can never succeed here: it can never fit, or the file is not whole. Try nothing; mend the cause."""

    status = anthropic_status = 422
    type = anthropic_type = "invalid_request_error"
    code = "load_impossible"

    def __init__(
        self, message: str, *, code: str = "load_impossible", details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, details=details)
        self.code = code


class TemplateFailed(HelexaError):
    """The model's chat template cannot show this conversation, or not with these tools; it is never shown in part."""

    status = anthropic_status = 422
    type = anthropic_type = "invalid_request_error"
    code = "template_failed"


class NotImplementedYet(HelexaError):
    """A dialect or endpoint of the contract that is not there yet."""

    status = anthropic_status = 501
    type = "server_error"
    code = "not_implemented"


class RateLimited(HelexaError):
    """The caller's own limit."""

    status = anthropic_status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    anthropic_type = "rate_limit_error"


class Transient(HelexaError):
    """Trying again is right; always with retry-after."""

    status = 503
    type = "server_error"
    code = "overloaded"
    anthropic_status = 529
    anthropic_type = "overloaded_error"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: int = 5,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s, details=details)


class Overloaded(Transient):
    """The fleet is full, or a queue is."""


class ModelLoading(Transient):
    """Wanted, not ready yet; never for a model that cannot fit.

    details: loading {state, node, progress, eta_seconds}.
    """

    code = "model_loading"


class ModelUnloading(Transient):
    """A neuron's answer while the model drains: another node, or a little later."""

    code = "model_unloading"


class NoNode(Transient):
    """No node that could serve it is alive."""

    code = "no_node"
    anthropic_status = 503
    anthropic_type = "api_error"


class LoadFailed(Transient):
    """The load was tried and failed; the message bears the node's reason."""

    code = "load_failed"
    anthropic_status = 503
    anthropic_type = "api_error"


class ShuttingDown(Transient):
    """SIGTERM came: no new requests here."""

    code = "shutting_down"
    anthropic_status = 503
    anthropic_type = "api_error"


class UpstreamError(HelexaError):
    """The node (or the model's host) died and no other could take the request."""

    status = anthropic_status = 502
    type = "server_error"
    code = "upstream_error"


class UpstreamTimeout(HelexaError):
    """The node stalled, or did not answer in time."""

    status = anthropic_status = 504
    type = "server_error"
    code = "upstream_timeout"
    anthropic_type = "timeout_error"


_encode = msgspec.json.Encoder().encode


def status_for(error: HelexaError, dialect: Dialect) -> int:
    """The HTTP status that this dialect gives the error."""
    return error.anthropic_status if dialect is Dialect.ANTHROPIC else error.status


def render(error: HelexaError, dialect: Dialect, request_id: str) -> bytes:
    """The JSON body of an error response, and the data of an error event in a stream."""
    if dialect is Dialect.OLLAMA:
        return _encode({"error": error.message, **error.details})
    if dialect is Dialect.ANTHROPIC:
        message = getattr(error, "anthropic_message", error.message)
        inner: dict[str, Any] = {"type": error.anthropic_type, "message": message, **error.details}
        return _encode({"type": "error", "error": inner, "request_id": request_id})
    inner = {"message": error.message, "type": error.type, "param": error.param, "code": error.code, **error.details}
    return _encode({"error": inner})


def render_event(error: HelexaError, dialect: Dialect, request_id: str) -> bytes:
    """The event that ends a stream which cannot go on, in the dialect; what follows is the end, never `[DONE]`."""
    data = render(error, dialect, request_id)
    if dialect is Dialect.OLLAMA:
        return data + b"\n"
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\n"


def nearest(name: str, known: list[str], limit: int = 3) -> list[str]:
    """The known names most like `name`, best first, for "did you mean"."""
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    hits = get_close_matches(name.lower(), list(by_lower), n=limit, cutoff=0.5)
    return [by_lower[h] for h in hits]
