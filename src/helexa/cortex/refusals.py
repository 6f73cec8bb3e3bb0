"""What a node's error answer means to the gateway: try another node, or let the client see it. Pure.

A node speaks the taxonomy of core.errors, so an error comes back with its own code, message and details; what another
program wrote is judged by its status alone.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helexa.core.errors import (
    HelexaError,
    LoadFailed,
    ModelLoading,
    ModelUnloading,
    NoNode,
    Overloaded,
    ShuttingDown,
    Transient,
    UpstreamError,
)

# A node that does not hold the model after all: the gateway's view was behind, and a load or another node mends it.
_MISSING: Final = frozenset({"model_not_found", "not_found"})
_TRANSIENT: Final[dict[str, type[Transient]]] = {
    cls.code: cls for cls in (Overloaded, ModelLoading, ModelUnloading, NoNode, LoadFailed, ShuttingDown)
}
_BROKEN: Final = frozenset({"internal_error", "upstream_error"})
_ENVELOPE: Final = frozenset({"message", "type", "param", "code"})


class NodeSaid(HelexaError):
    """A node's own refusal that the client got as it was; for the request's line in the log."""

    def __init__(self, code: str | None, message: str) -> None:
        super().__init__(message)
        self.code = code or "upstream_error"


def _codes(of: type[HelexaError]) -> frozenset[str]:
    """The codes of all errors of this kind that no other node would mend."""
    own = {of.code} if 400 <= of.status < 500 or of.status in (501, 504) else set()
    return frozenset(own).union(*map(_codes, of.__subclasses__()))


_FOR_THE_CALLER: Final = _codes(HelexaError) - {"conflict"}


class _Inner(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Envelope(msgspec.Struct):
    error: _Inner


# Text that is not UTF-8 is a ValueError to msgspec, and nesting without end a RecursionError.
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
_decode = msgspec.json.Decoder(_Envelope).decode


def code_and_message(body: bytes) -> tuple[str | None, str]:
    """(None, "") for a body that is not OpenAI's envelope."""
    try:
        inner = _decode(body).error
    except _UNREADABLE:
        return None, ""
    return inner.code if isinstance(inner.code, str) else None, inner.message


def judge(model: str, node: str, status: int, body: bytes) -> HelexaError | None:
    """None: the client gets the node's answer as it is. Else what to tell it if no other node takes the request."""
    code, message = code_and_message(body)
    if status in (401, 403):
        return UpstreamError(
            f"{node} refused the gateway's key, so {model} could not be asked; set `token` of [[neurons]] in "
            f"cortex.toml to the node's own"
        )
    if status in (404, 503) and code in _MISSING:
        return ModelLoading(f"{node} no longer holds {model}; try again", details={"loading": {"state": "unloaded"}})
    # A node whose stream has begun can tell its error only as an event, which has no status: the code decides.
    if status == 503 and code not in _BROKEN:
        if code in _FOR_THE_CALLER:
            return None
        known = _TRANSIENT.get(code or "", Overloaded)
        return known(message or f"{node} cannot take {model} now; try again", details=_details(body))
    if status in (500, 502, 503):
        return UpstreamError(message or f"{model} failed on {node} (status {status})", details=_details(body))
    return None


def state_of(error: ModelLoading | ModelUnloading) -> str | None:
    """What the node said of the model; None where it did not."""
    loading = error.details.get("loading")
    if isinstance(loading, dict) and isinstance(state := loading.get("state"), str):
        return state
    return "unloading" if isinstance(error, ModelUnloading) else None


def _details(body: bytes) -> dict[str, Any]:
    try:
        error = msgspec.json.decode(body)["error"]
        return {k: v for k, v in error.items() if k not in _ENVELOPE}
    except (*_UNREADABLE, KeyError, TypeError, AttributeError):
        return {}
