"""The models of the fleet as Anthropic lists them. Pure: entries of `GET /v1/models` in, its own shape out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from helexa.core.errors import BadRequest

_PAGE: Final = 20  # Anthropic's own default and bound
_MAX_PAGE: Final = 1000


def model(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One model. What is not known of it is left out, or null where the type needs the key."""
    made: dict[str, Any] = {
        "type": "model",
        "id": entry["id"],
        "display_name": entry["id"],
        "created_at": datetime.fromtimestamp(entry["created"], UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
    }
    if context := entry.get("max_model_len"):
        made["max_input_tokens"] = made["max_tokens"] = context  # they share it
    if (known := entry.get("capabilities")) is not None:
        made["capabilities"] = _capabilities(frozenset(known))
    return made


def page(entries: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """query: limit, after_id, before_id. Raises BadRequest."""
    ids = [entry["id"] for entry in entries]
    limit = _limit(query.get("limit"))
    begin, end = 0, len(ids)
    if "after_id" in query:
        begin = _place(ids, query, "after_id") + 1
        end = min(end, begin + limit)
        more = end < len(ids)
    elif "before_id" in query:
        end = _place(ids, query, "before_id")
        begin = max(0, end - limit)
        more = begin > 0
    else:
        end = min(end, limit)
        more = end < len(ids)
    shown = ids[begin:end]
    return {
        "data": [model(entry) for entry in entries[begin:end]],
        "has_more": more,
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }


def _limit(text: str | None) -> int:
    if text is None:
        return _PAGE
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MAX_PAGE:
        raise BadRequest(f"limit: must be 1 to {_MAX_PAGE}, not {text}", param="limit")
    return int(text)


def _place(ids: Sequence[str], query: Mapping[str, str], name: str) -> int:
    if query[name] not in ids:
        raise BadRequest(f"{name}: no model is called {query[name]!r}", param=name)
    return ids.index(query[name])


def _capabilities(known: frozenset[str]) -> dict[str, Any]:
    """Every key that Anthropic has, as its clients expect them."""

    def can(is_so: bool) -> dict[str, Any]:
        return {"supported": is_so}

    reasons = "reasoning" in known
    efforts = {level: can(reasons) for level in ("low", "medium", "high", "xhigh", "max")}
    return {
        "batch": can(False),
        "citations": can(False),
        "code_execution": can(False),
        "context_management": can(True)
        | {
            "clear_thinking_20251015": can(True),
            "clear_tool_uses_20250919": can(False),
            "compact_20260112": can(False),
        },
        "effort": can(reasons) | efforts,
        "image_input": can("vision" in known),
        "pdf_input": can(False),
        "server_tools": can(False) | {"code_execution": can(False), "web_search": can(False)},
        "structured_outputs": can("chat" in known),
        "thinking": can(reasons)
        | {
            "types": {
                "adaptive": can(reasons),
                "between_tools": can(True),
                "disabled": can(True),
                "enabled": can(reasons),
            }
        },
    }
