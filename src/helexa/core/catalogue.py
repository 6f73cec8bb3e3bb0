"""The catalogue: models.toml, the one place that says how a model is served. Profiles, aliases, resolution of names."""

from __future__ import annotations

from typing import Any

import msgspec

from helexa.core.lifecycle import LoadRequest


class ModelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One [[models]] entry. What LoadRequest has too goes to the node as it is; the rest is the gateway's."""

    id: str
    harness: str | None = None
    source: str | None = None
    quant: str | None = None
    task: str | None = None
    context: int | None = None
    slots: int | None = None
    tensor_parallel: int | None = None
    shares: list[float] | None = None
    devices: list[int] | None = None
    kv_cache: str | None = None
    kv_unified: bool | None = None
    gpu_layers: int | None = None
    threads: int | None = None
    batch: int | None = None
    flash_attention: bool | None = None
    prompt_cache_mb: int | None = None
    chat_template: str | None = None
    draft: str | None = None
    projector: str | None = None
    lora: list[str] | None = None
    vram_mb: int | None = None
    min_devices: int | None = None
    min_device_vram_mb: int | None = None
    limits: dict[str, Any] | None = None
    capabilities: list[str] | None = None
    # the gateway's own
    pinned_on: list[str] = []
    residency_priority: int = 0
    ttl_s: float | None = None
    max_replicas: int | None = None
    preload: bool = False
    cost: dict[str, float] | None = None

    def load_request(self) -> LoadRequest:
        """The whole profile, as a node is asked for it."""
        shared = set(LoadRequest.__struct_fields__) & set(self.__struct_fields__)
        return LoadRequest(model_id=self.id, **{name: getattr(self, name) for name in shared})


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: list[ModelProfile] = []
    aliases: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        """The id that an alias stands for; any other name as it is."""
        return self.aliases.get(name, name)

    def profile(self, model_id: str) -> ModelProfile | None:
        return next((m for m in self.models if m.id == model_id), None)

    def aliases_of(self, model_id: str) -> list[str]:
        return [alias for alias, target in self.aliases.items() if target == model_id]
