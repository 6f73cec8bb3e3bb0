"""What a node's answer to a load means, and what the caller is told when no node could. Pure.

A node's reason is passed on in its own words; where memory is in the way, it is said whose memory, so that a person
can act on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import ceil
from typing import Any, Final

import msgspec

from helexa.core.errors import (
    Conflict,
    HelexaError,
    LoadFailed,
    ModelNotServable,
    NeverLoads,
    NoNode,
    Overloaded,
)
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node, why_not_up
from helexa.cortex.plans import Bar, Reason
from helexa.cortex.swapper import Failure, Kind

# The node's `error.code` first, since a status alone says too little; then the status.
_BY_CODE: Final[dict[str, Kind]] = {
    "insufficient_memory": Kind.NO_ROOM,
    "loaded_differently": Kind.DIFFERENT,
    "load_impossible": Kind.NEVER,
    "model_unloading": Kind.BUSY,
    "shutting_down": Kind.GONE,
    "load_failed": Kind.FAILED,
    "overloaded": Kind.BUSY,  # it has just started, and looks at its devices still
}
# 400: an option of this profile; 403, 404: a source that this node may not or cannot get.
_BY_STATUS: Final[dict[int, Kind]] = {400: Kind.NEVER, 403: Kind.NEVER, 404: Kind.NEVER, 422: Kind.NEVER}

_BY_BAR: Final[dict[Bar, Kind]] = {
    Bar.NEVER: Kind.NEVER,
    Bar.PINNED: Kind.PINNED,
    Bar.NOT_NOW: Kind.NO_ROOM,
    Bar.AWAY: Kind.GONE,
}

_REASON_CHARS: Final = 600


def of_reasons(reasons: Iterable[Reason]) -> tuple[Failure, ...]:
    """Why a placement did not find room, as what stands against each node."""
    return tuple(Failure(r.node, _BY_BAR[r.bar], r.text, _details(r)) for r in reasons)


def _details(reason: Reason) -> dict[str, Any]:
    """What a program can read of it."""
    need = reason.need
    details: dict[str, Any] = {"pins": reason.pins} if reason.pins else {}
    if need is not None:
        details["need_mb"] = need.total_mb
        if need.split is not None:
            details |= asdict(need.split)
        if need.ways and need.told == reason.node:
            details["ways"] = list(need.ways)
    return details


def read_refusal(node: str, status: int, body: bytes) -> Failure:
    """A node's answer >= 400 to a load."""
    error = _error_of(body)
    code, said = error.pop("code", None), error.pop("message", None)
    reason = said if isinstance(said, str) and said else body[:200].decode("utf-8", "replace").strip() or "no reason"
    kind = _BY_CODE.get(code) if isinstance(code, str) else None
    kind = kind or _BY_STATUS.get(status, Kind.FAILED)
    details: dict[str, Any] = {key: error[key] for key in ("need_mb", "free_mb", "devices") if key in error}
    return Failure(node, kind, reason[:_REASON_CHARS], details)


def refusal_message(body: bytes) -> str:
    """The message of an error body, or what there is of it."""
    said = _error_of(body).get("message")
    return said if isinstance(said, str) else body[:200].decode("utf-8", "replace")


def active_requests(body: bytes) -> dict[str, Any]:
    """The members of a refused unload that the contract promises."""
    error = _error_of(body)
    return {key: error[key] for key in ("active_requests",) if key in error}


def _error_of(body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: a string that is no UTF-8
        return {}
    error = decoded.get("error") if isinstance(decoded, dict) else None
    return dict(error) if isinstance(error, dict) else {}


def no_place(fleet: Fleet, model_id: str, failures: Sequence[Failure], retry_after_s: float) -> HelexaError:
    """Why nobody could load it.

    1. Memory is in the way somewhere: the fleet is full, with what holds it.
    2. A load was tried and failed, or a node died in it: that reason.
    3. Every node that may hold it never can, or holds pinned models in its place: the model is not servable.
    4. The nodes that may hold it are not alive.
    """
    retry = max(1, ceil(retry_after_s))
    kinds = {f.kind for f in failures}
    told = _told(failures)
    if Kind.NO_ROOM in kinds:
        blocked = [f for f in failures if f.kind is Kind.NO_ROOM]
        others = _told(f for f in failures if f.kind is not Kind.NO_ROOM)
        message = f"no node has room for {model_id}: " + "; ".join(_in_the_way(fleet, f) for f in blocked)
        message += (f"; {others}" if others else "") + ". Unload one of these models, or try again later."
        return Overloaded(
            message, retry_after_s=max(retry, 5), details={"nodes": [_holding(fleet, f) for f in blocked]}
        )
    if kinds & {Kind.FAILED, Kind.OUT_OF_MEMORY, Kind.BUSY}:
        return LoadFailed(f"{model_id} could not be loaded: {told}", retry_after_s=retry)
    absent = _absent(fleet, model_id, {f.node for f in failures})
    if kinds and kinds <= {Kind.NEVER, Kind.PINNED} and not absent:
        pins = dict.fromkeys(pin for f in failures for pin in f.details.get("pins", ()))
        message = f"no node can ever serve {model_id}: {told}"
        if Kind.PINNED in kinds:
            message = f"no node can serve {model_id} beside what is pinned ({', '.join(pins)}): {told}"
        nodes = [{"node": f.node, **f.details} for f in failures if "need_mb" in f.details]
        details = {**({"pins": list(pins)} if pins else {}), **({"nodes": nodes} if nodes else {})}
        return ModelNotServable(message, param="model", details=details)
    profile = fleet.profiles.get(model_id)
    if profile is not None and profile.pinned_on and not set(profile.pinned_on) & fleet.nodes.keys():
        names = ", ".join(profile.pinned_on)
        return ModelNotServable(
            f"{model_id} is pinned on {names}, and no node of that name is configured; mend pinned_on in models.toml",
            param="model",
        )
    where = "no node that could serve it is alive" if fleet.nodes else fleet.why_no_node().rstrip(".")
    parts = "; ".join(filter(None, [told, absent]))
    return NoNode(f"{model_id}: {where}" + (f": {parts}" if parts else ""), retry_after_s=max(retry, 2))


def on_node(model_id: str, failure: Failure) -> HelexaError:
    """For an operator who named the node."""
    message = f"{model_id} on {failure.node}: {failure.reason}"
    match failure.kind:
        case Kind.NO_ROOM:
            return Conflict(message, code="insufficient_memory", details=failure.details)
        case Kind.DIFFERENT:
            return Conflict(message, code="loaded_differently")
        case Kind.NEVER | Kind.PINNED:
            return NeverLoads(message, details=failure.details)
        case Kind.GONE:
            return NoNode(message)
        case Kind.FAILED | Kind.OUT_OF_MEMORY | Kind.BUSY:
            return LoadFailed(message)


def _told(failures: Iterable[Failure]) -> str:
    return "; ".join(f"{f.node}: {f.reason.rstrip('.')}" for f in failures)


def _absent(fleet: Fleet, model_id: str, asked: set[str]) -> str:
    """The nodes that might hold it and could not be asked; "" where all were."""
    profile = fleet.profiles.get(model_id)
    if profile is None:
        nodes = fleet.where(model_id)
    else:
        nodes = [n for n in fleet.nodes.values() if not profile.pinned_on or n.name in profile.pinned_on]
    return "; ".join(_state(n) for n in nodes if n.name not in asked)


def _state(node: Node) -> str:
    why = why_not_up(node)
    return f"{node.name} is {node.state}" + (f" ({why})" if why else "")


def _in_the_way(fleet: Fleet, failure: Failure) -> str:
    need, free = failure.details.get("need_mb"), failure.details.get("free_mb")
    figures = isinstance(need, int) and isinstance(free, int)
    said = f"needs {need:,} MB and has {free:,} MB free" if figures else failure.reason.rstrip(".")
    held = ", ".join(
        m["id"]
        + (f" holds {m['vram_used_mb']:,} MB" if "vram_used_mb" in m else "")
        + (f" with {m['active_requests']} requests running" if m.get("active_requests") else "")
        for m in _holding(fleet, failure)["models"]
    )
    return f"{failure.node} {said}" + (f" ({held})" if held else "")


def _holding(fleet: Fleet, failure: Failure) -> dict[str, Any]:
    """What holds the node's memory, the largest first."""
    node = fleet.nodes.get(failure.node)
    held: list[dict[str, Any]] = [
        {
            "id": model_id,
            "status": info.status,
            **({"vram_used_mb": info.vram_used_mb} if info.vram_used_mb else {}),
            **({"active_requests": info.active_requests} if info.active_requests else {}),
        }
        for model_id, info in (node.models.items() if node else ())
        if info.vram_used_mb or info.status in ("loaded", "loading", "unloading", "recovering")
    ]
    held.sort(key=lambda m: m.get("vram_used_mb", 0), reverse=True)
    return {"node": failure.node, **failure.details, "models": held}
