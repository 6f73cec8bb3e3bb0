"""A node as `GET /fleet` shows it. Pure. A field is true or absent, as in listing.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from helexa.core.lifecycle import ModelInfo, ModelStatus
from helexa.cortex.listing import rfc3339
from helexa.cortex.nodes import Node


def node_view(node: Node, is_as_configured: Callable[[str, ModelInfo], bool]) -> dict[str, Any]:
    """One of GET /fleet's nodes. Its token is nowhere in it."""
    seen: dict[str, Any] = {
        "name": node.name,
        "endpoint": node.endpoint,
        "state": node.state,
        "since": rfc3339(node.since),
        "discovery": node.discovery.to_wire() if node.discovery else None,
        "health": msgspec.to_builtins(node.health) if node.health else None,
        "version": node.version,
        "models": list(_models_view(node, is_as_configured)),
    }
    if node.is_set_aside:
        seen["set_aside"] = True
    if node.last_error is not None:
        seen["last_error"] = node.last_error
    return {key: value for key, value in seen.items() if value is not None}


def _models_view(node: Node, is_as_configured: Callable[[str, ModelInfo], bool]) -> Iterator[dict[str, Any]]:
    for model_id, info in node.models.items():
        replica = node.replicas.get(model_id)
        shown = {**msgspec.to_builtins(info), "id": model_id, "inflight": replica.inflight if replica else 0}
        if replica is not None and (rate := replica.work.rate) is not None:
            shown["prefill_tokens_per_s"] = round(rate, 1)
        if info.status == ModelStatus.LOADED and not is_as_configured(model_id, info):
            shown["loaded_differently"] = True
        yield shown
