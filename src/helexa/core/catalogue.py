"""The catalogue: models.toml, the one place that says how a model is served. Profiles and aliases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from helexa.core import aliases, profile, settings_file
from helexa.core.config import Bounds, is_legacy, log_warning
from helexa.core.lifecycle import LoadRequest, ServingProfile
from helexa.core.settings_file import Fault, Key


class ModelProfile(ServingProfile, frozen=True):
    """One [[models]] entry: the serving profile, which goes to the node as it is, and the gateway's own wishes."""

    id: str
    pinned_on: list[str] = []
    residency_priority: Annotated[int, Meta(ge=-1_000, le=1_000)] = 0
    ttl_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None
    max_replicas: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    preload: bool = False
    limits: Bounds | None = None
    cost: dict[str, Annotated[float, Meta(ge=0, le=1e9)]] | None = None  # USD per million tokens

    def load_request(self) -> LoadRequest:
        """The whole profile, as a node is asked for it."""
        return LoadRequest(model_id=self.id, **{f: getattr(self, f) for f in ServingProfile.__struct_fields__})


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """aliases: as the file has them; `core.aliases` says what each stands for."""

    models: list[ModelProfile] = []
    aliases: dict[str, str | list[str]] = {}

    def profile(self, model_id: str) -> ModelProfile | None:
        return next((m for m in self.models if m.id == model_id), None)


def load_catalogue(path: Path, warn: Callable[[str], None] = log_warning) -> Catalogue:
    """models.toml, checked. Raises ConfigError with everything that is wrong in it."""
    return settings_file.read(Catalogue, path, legacy=is_legacy, rules=_rules, warn=warn)


def _rules(catalogue: Catalogue) -> Iterator[Fault]:
    seen: dict[str, int] = {}
    for index, model in enumerate(catalogue.models):
        at: Key = ("models", index)
        yield from profile.id_faults(model.id, (*at, "id"))
        if (first := seen.setdefault(model.id, index)) != index:
            yield Fault((*at, "id"), f"is described twice (entries {first + 1} and {index + 1})")
        yield from profile.faults(model, at)
        if len(set(model.pinned_on)) != len(model.pinned_on) or not all(model.pinned_on):
            yield Fault((*at, "pinned_on"), "has an empty or a repeated node")
    for alias in catalogue.aliases:
        at = ("aliases", alias)
        yield from profile.id_faults(alias, at)
        for target in aliases.targets_of(alias, catalogue.aliases):
            yield from profile.id_faults(target, at)
        if alias in seen:
            yield Fault(at, "is the id of a model too; a name means one thing")
            continue
        for mistake in aliases.mistakes(alias, catalogue.aliases):
            yield Fault(at, mistake)
