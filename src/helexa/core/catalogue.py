"""The catalogue: models.toml, the one place that says how a model is served. Profiles, aliases, resolution of names."""

from __future__ import annotations

import msgspec

from helexa.core.lifecycle import LoadRequest, ServingProfile


class ModelProfile(ServingProfile, frozen=True):
    """One [[models]] entry: the serving profile, which goes to the node as it is, and the gateway's own wishes."""

    id: str
    pinned_on: list[str] = []
    residency_priority: int = 0
    ttl_s: float | None = None
    max_replicas: int | None = None
    preload: bool = False
    cost: dict[str, float] | None = None

    def load_request(self) -> LoadRequest:
        """The whole profile, as a node is asked for it."""
        return LoadRequest(model_id=self.id, **{f: getattr(self, f) for f in ServingProfile.__struct_fields__})


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
