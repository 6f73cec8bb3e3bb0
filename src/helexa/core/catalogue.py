"""The catalogue: models.toml, the one place that says how a model is served. Profiles, aliases, resolution of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from helexa.core import profile, settings_file
from helexa.core.config import is_legacy, log_warning
from helexa.core.lifecycle import LoadRequest, ServingProfile
from helexa.core.settings_file import Fault, Key

# Wishes that wait for the part that will act on them.
IDLE = frozenset({("models", "limits")})


class ModelProfile(ServingProfile, frozen=True):
    """One [[models]] entry: the serving profile, which goes to the node as it is, and the gateway's own wishes."""

    id: str
    pinned_on: list[str] = []
    residency_priority: Annotated[int, Meta(ge=-1_000, le=1_000)] = 0
    ttl_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None
    max_replicas: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    preload: bool = False
    cost: dict[str, Annotated[float, Meta(ge=0, le=1e9)]] | None = None  # USD per million tokens

    def load_request(self) -> LoadRequest:
        """The whole profile, as a node is asked for it."""
        return LoadRequest(model_id=self.id, **{f: getattr(self, f) for f in ServingProfile.__struct_fields__})


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """aliases lead straight to an id: the loader follows an alias of an alias to its end."""

    models: list[ModelProfile] = []
    aliases: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        """The id that an alias stands for; any other name as it is."""
        return self.aliases.get(name, name)

    def profile(self, model_id: str) -> ModelProfile | None:
        return next((m for m in self.models if m.id == model_id), None)

    def aliases_of(self, model_id: str) -> list[str]:
        return [alias for alias, target in self.aliases.items() if target == model_id]


def load_catalogue(path: Path, warn: Callable[[str], None] = log_warning) -> Catalogue:
    """models.toml, checked. Raises ConfigError with everything that is wrong in it."""
    catalogue = settings_file.read(Catalogue, path, legacy=is_legacy, idle=IDLE, rules=_rules, warn=warn)
    return Catalogue(models=catalogue.models, aliases={a: _end_of(a, catalogue.aliases) for a in catalogue.aliases})


def _end_of(alias: str, aliases: dict[str, str]) -> str:
    while alias in aliases:  # loops were refused before
        alias = aliases[alias]
    return alias


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
    for alias, target in catalogue.aliases.items():
        at = ("aliases", alias)
        yield from profile.id_faults(alias, at)
        yield from profile.id_faults(target, at)
        if alias in seen:
            yield Fault(at, "is the id of a model too; a name means one thing")
        elif (loop := _loop(alias, catalogue.aliases)) is not None:
            yield Fault(at, f"leads back to itself: {' -> '.join(loop)}")


def _loop(alias: str, aliases: dict[str, str]) -> list[str] | None:
    """The way from an alias back to itself; None where it ends."""
    way = [alias]
    while (target := aliases.get(way[-1])) is not None:
        way.append(target)
        if target == alias:
            return way
        if target in way[:-1]:  # a loop further on, told at the aliases that are in it
            return None
    return None
