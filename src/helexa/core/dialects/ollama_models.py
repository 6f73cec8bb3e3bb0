"""The models of the fleet as Ollama lists them. Pure: entries of `GET /v1/models` and what nodes say in, its shape out.

What nobody knows of a model is left out. Its name is its id, without a tag: it is what the other dialects take too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from helexa.core.lifecycle import ModelInfo

# Whose API this is: clients compare it with what they need (VS Code asks for 0.6.4 at least).
API_VERSION: Final = "0.12.6"
# As Ollama itself writes the end of what never ends; year 9999 breaks clients that shift it to their own time zone.
FOREVER: Final = datetime(2318, 1, 1, tzinfo=UTC)
_CAPABILITIES: Final = {
    "chat": "completion",
    "completion": "completion",
    "tools": "tools",
    "reasoning": "thinking",
    "vision": "vision",
    "embed": "embedding",
}


@dataclass(frozen=True, slots=True)
class Running:
    """One model that is loaded. size_mb: on all nodes together; vram_mb: what of it is not in a CPU's memory.
    expires_at: seconds since 1970, None: it stays until the room is needed."""

    size_mb: int
    vram_mb: int
    expires_at: float | None


def tag(entry: Mapping[str, Any], said: Sequence[ModelInfo]) -> dict[str, Any]:
    """One of /api/tags. said: what nodes say of the model, the best known first."""
    made: dict[str, Any] = {
        "name": entry["id"],
        "model": entry["id"],
        "modified_at": _time(entry["created"]),
        "size": entry.get("meta", {}).get("size") or 0,
        "digest": _digest(entry, said),
        "details": _details(entry, said),
    }
    if capabilities := _capabilities(entry, said):
        made["capabilities"] = capabilities
    return made


def running(entry: Mapping[str, Any], said: Sequence[ModelInfo], now: Running) -> dict[str, Any]:
    """One of /api/ps."""
    made: dict[str, Any] = {
        "name": entry["id"],
        "model": entry["id"],
        "size": now.size_mb << 20,
        "digest": _digest(entry, said),
        "details": _details(entry, said),
        "expires_at": _time(now.expires_at if now.expires_at is not None else FOREVER.timestamp()),
        "size_vram": now.vram_mb << 20,
    }
    if context := entry.get("max_model_len"):
        made["context_length"] = context
    return made


def show(entry: Mapping[str, Any], said: Sequence[ModelInfo]) -> dict[str, Any]:
    """/api/show. `context_length` is what a request may have here: clients cut their prompts to it."""
    meta, family = entry.get("meta", {}), _first(said, "architecture")
    context = entry.get("max_model_len")
    info: dict[str, Any] = {"general.basename": entry["id"]}
    if family:
        info["general.architecture"] = family
    if params := meta.get("n_params"):
        info["general.parameter_count"] = params
    if context or meta.get("n_ctx_train"):
        info[f"{family or 'general'}.context_length"] = context or meta["n_ctx_train"]
    made: dict[str, Any] = {
        "details": _details(entry, said),
        "model_info": info,
        "capabilities": _capabilities(entry, said),
        "modified_at": _time(entry["created"]),
    }
    if context:
        made["parameters"] = f"num_ctx {context}"
    return made


def _details(entry: Mapping[str, Any], said: Sequence[ModelInfo]) -> dict[str, Any]:
    family = _first(said, "architecture")
    params = entry.get("meta", {}).get("n_params")
    quant = _first(said, "quant")
    made: dict[str, Any] = {"parent_model": "", "format": "gguf"}
    if family:
        made |= {"family": family, "families": [family]}
    if params:
        made["parameter_size"] = _parameter_size(params)
    if quant:
        made["quantization_level"] = quant
    return made


def _capabilities(entry: Mapping[str, Any], said: Sequence[ModelInfo]) -> list[str]:
    known = [*entry.get("capabilities", ()), _first(said, "task")]
    return list(dict.fromkeys(_CAPABILITIES[c] for c in known if c in _CAPABILITIES))


def _digest(entry: Mapping[str, Any], said: Sequence[ModelInfo]) -> str:
    """Of what is served, not of a file: it changes when another file, quantisation or profile is."""
    parts = [entry["id"], _first(said, "source"), _first(said, "quant"), entry.get("meta", {}).get("size")]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _parameter_size(count: int) -> str:
    """As Ollama writes it: 134.52M, 8.2B."""
    if count >= 10**9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.2f}M" if count >= 10**6 else f"{count / 1e3:.2f}K"


def _first(said: Sequence[ModelInfo], field: str) -> Any:
    return next((found for info in said if (found := getattr(info, field))), None)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
