"""A model as `GET /v1/models` lists it: what all nodes and the catalogue say about it, merged. Pure.

A field is true or absent: what nobody knows is left out, never false or 0 (clients read 0 as a context of nothing).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from helexa.core.catalogue import ModelProfile
from helexa.core.lifecycle import ModelInfo, ModelStatus

# The nearer to an answer, the higher. A word we do not know ranks below everything: it is not routable.
RANK: Final[dict[str, int]] = {
    ModelStatus.LOADED: 7,
    ModelStatus.RECOVERING: 6,
    ModelStatus.LOADING: 5,
    ModelStatus.DOWNLOADING: 4,
    ModelStatus.UNLOADING: 3,
    ModelStatus.UNLOADED: 2,
    ModelStatus.FAILED: 1,
}

# OpenRouter's words, which clients took over.
_OUTPUT: Final[dict[str, list[str]]] = {"embed": ["embeddings"], "rerank": ["rerank"]}


@dataclass(frozen=True, slots=True)
class Holding:
    """What one node says about a model. state: the node's own."""

    node: str
    state: str
    info: ModelInfo


def status_rank(status: str) -> int:
    return RANK.get(status, 0)


def entry(
    model_id: str,
    holdings: Sequence[Holding],
    *,
    profile: ModelProfile | None,
    aliases: Collection[str],
    created: int,
) -> dict[str, Any]:
    """The entry, built for one encoding of JSON. Nodes that are down are listed, and say so, but decide nothing."""
    reachable = sorted(
        (h.info for h in holdings if h.state != "down"), key=lambda info: status_rank(info.status), reverse=True
    )
    known = reachable + [h.info for h in holdings if h.state == "down"]
    value = reachable[0].status if reachable and status_rank(reachable[0].status) else ModelStatus.UNLOADED.value
    made: dict[str, Any] = {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "helexa",
        "status": {"value": value},
    }
    if holdings:
        made["nodes"] = [_node(h) for h in sorted(holdings, key=lambda h: h.node)]
    if aliases:
        made["aliases"] = sorted(aliases)
    context = _context(reachable, known, profile)
    if context:
        made["max_model_len"] = context
    meta = {
        "n_ctx": context,
        "n_ctx_train": _first(known, "n_ctx_train"),
        "n_params": _first(known, "n_params"),
        "size": _first(known, "size_bytes"),
    }
    if any(meta.values()):
        made["meta"] = {key: figure for key, figure in meta.items() if figure}
    capabilities = _first(known, "capabilities") or (profile.capabilities if profile else None)
    task = _first(known, "task") or (profile.task if profile else None)
    if capabilities:
        made["capabilities"] = capabilities
    if capabilities or task:
        made["architecture"] = _architecture(capabilities or [], task)
    if profile is not None and profile.cost:
        made["cost"] = profile.cost
    return made


def _node(holding: Holding) -> dict[str, Any]:
    said = {"name": holding.node, "status": holding.info.status}
    return said if holding.state == "up" else {**said, "state": holding.state}


def _context(reachable: Sequence[ModelInfo], known: Sequence[ModelInfo], profile: ModelProfile | None) -> int | None:
    """What any replica can take: a request may come to the smallest. Not loaded: what is wished, else last known."""
    loaded = [
        info.limits.context
        for info in reachable
        if info.status == ModelStatus.LOADED and info.limits is not None and info.limits.context
    ]
    if loaded:
        return min(loaded)
    if profile is not None and profile.context:
        return profile.context
    return next((info.limits.context for info in known if info.limits is not None and info.limits.context), None)


def _first(known: Sequence[ModelInfo], field: str) -> Any:
    return next((found for info in known if (found := getattr(info, field))), None)


def _architecture(capabilities: Collection[str], task: str | None) -> Mapping[str, list[str]]:
    inputs = ["text", "image"] if "vision" in capabilities else ["text"]
    kind = next((k for k in _OUTPUT if task == k or k in capabilities), None)
    return {"input_modalities": inputs, "output_modalities": _OUTPUT[kind] if kind else ["text"]}


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
