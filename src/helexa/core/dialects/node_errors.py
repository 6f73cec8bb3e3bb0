"""What a node said went wrong, as an error that a client of another dialect can be told. Pure.

Nodes speak OpenAI's envelope; the class carries the status and type of each dialect. The fields that a node names are
the chat body's: a Naming says what the client calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from helexa.core.bodies import try_decode
from helexa.core.errors import (
    BadRequest,
    ContextLengthExceeded,
    HelexaError,
    LoadFailed,
    ModelLoading,
    ModelNotFound,
    ModelNotServable,
    ModelUnloading,
    NeverLoads,
    NoNode,
    Overloaded,
    RateLimited,
    RequestTooLarge,
    ShuttingDown,
    TemplateFailed,
    UnsupportedModality,
    UpstreamError,
    UpstreamTimeout,
    WrongTask,
)

_CLASSES: Final[dict[str, type[HelexaError]]] = {
    cls.code: cls
    for cls in (
        BadRequest,
        UnsupportedModality,
        WrongTask,
        ModelNotFound,
        ModelNotServable,
        RequestTooLarge,
        TemplateFailed,
        RateLimited,
        Overloaded,
        ModelLoading,
        ModelUnloading,
        NoNode,
        LoadFailed,
        ShuttingDown,
        UpstreamError,
        UpstreamTimeout,
    )
}
_ENVELOPE: Final = frozenset({"message", "type", "param", "code"})
Naming = Callable[[str], str]


def same(param: str) -> str:
    return param


class _Envelope(msgspec.Struct):
    error: dict[str, Any] | None = None


_envelope = msgspec.json.Decoder(_Envelope)


def from_answer(status: int, body: bytes, naming: Naming = same) -> HelexaError:
    """An answer of `status` >= 400 with this body."""
    envelope = try_decode(_envelope, body)
    if envelope is not None and envelope.error is not None:
        return from_object(envelope.error, naming, status)
    text = body[:500].decode("utf-8", "replace")
    return _by_status(status, f"the node answered {status}: {text}" if text else f"the node answered {status}")


def from_object(error: dict[str, Any], naming: Naming = same, status: int = 502) -> HelexaError:
    """The `error` object of an envelope, or of an event in a stream (which has no status)."""
    message, code, param = str(error.get("message") or "the node failed"), error.get("code"), error.get("param")
    details = {key: value for key, value in error.items() if key not in _ENVELOPE}
    if code == ContextLengthExceeded.code:
        return _too_long(message, details, naming)
    cls = _CLASSES.get(code) if isinstance(code, str) else None
    if cls is None:
        made = _by_status(status, message)
        made.details.update(details)
        return made
    name = naming(param) if isinstance(param, str) else None
    if name is not None and name != param:
        message = message.replace(f"`{param}`", f"`{name}`")
    return cls(message, param=name, details=details)


def _by_status(status: int, message: str) -> HelexaError:
    """Where the code says nothing: another program's answer, or a code of an error that has its own with it."""
    if status == 422:
        return NeverLoads(message)
    if status == 404:
        return ModelNotFound(message)
    if status == 429:
        return RateLimited(message)
    if status == 503:
        return Overloaded(message)
    if status == 504:
        return UpstreamTimeout(message)
    return BadRequest(message) if 400 <= status < 500 else UpstreamError(message)


def _too_long(message: str, details: dict[str, Any], naming: Naming) -> HelexaError:
    """In each dialect's own phrase where the figures are known: clients read it to know that they have to compact."""
    prompt, context = details.get("n_prompt_tokens"), details.get("n_ctx")
    error: HelexaError
    if isinstance(prompt, int) and isinstance(context, int):
        error = ContextLengthExceeded("the model", prompt, context)
    else:
        error = BadRequest(message, details=details)
        error.code = ContextLengthExceeded.code
    error.param = naming("messages")
    return error
