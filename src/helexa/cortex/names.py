"""Which model a name means. One file has one id: the catalogue's, where the catalogue names it, else the node's own.

A node does not know the catalogue: it lists a file on its disk as "owner/repo:QUANT" or by its path, and the profile
that names the same file has an id of its own. Here the two are found to be one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from heapq import nlargest
from typing import Final

from helexa.core.aliases import Aliases
from helexa.core.catalogue import Catalogue, ModelProfile
from helexa.core.errors import nearest
from helexa.core.lifecycle import ModelInfo

SHORTLIST: Final = 24


class Names:
    """The catalogue's ids, aliases and references. Fixed for one catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._spec_hashes: dict[str, str] = {}
        self.profiles: dict[str, ModelProfile] = {m.id: m for m in catalogue.models}
        self.aliases = Aliases(catalogue.aliases)
        owners: dict[str, set[str]] = {}
        for model in catalogue.models:
            for reference in _references(model):
                owners.setdefault(reference.lower(), set()).add(model.id)
        # A file that two profiles serve differently is neither's: it keeps the node's own name.
        self._owner = {ref: next(iter(ids)) for ref, ids in owners.items() if len(ids) == 1}

    def spec_hash(self, model_id: str) -> str | None:
        """Of its profile, as nodes tell it of what they have loaded; None where the catalogue does not name it."""
        profile = self.profiles.get(model_id)
        if profile is None:
            return None
        known = self._spec_hashes.get(model_id)
        if known is None:
            known = self._spec_hashes[model_id] = profile.load_request().spec_hash()
        return known

    def of_reference(self, name: str) -> str | None:
        """The catalogue's id for what a node would call `name`; None where no profile, or more than one, names it."""
        return self._owner.get(name.lower())

    def of(self, info: ModelInfo) -> str:
        """The gateway's id for what a node lists."""
        if info.id in self.profiles:
            return info.id
        named = self.of_reference(info.id)
        if named is None and info.source is not None and info.source.startswith("/"):
            named = self.of_reference(info.source)
        return named or info.id


def _references(profile: ModelProfile) -> Iterator[str]:
    """What a node may call the file of this profile (docs/reference/settings.md, "How a model is found")."""
    source = profile.source
    if source is not None:
        yield source
    if source is None or not source.startswith("/"):
        base = source or profile.id
        if profile.quant is not None and ":" not in base:
            yield f"{base}:{profile.quant}"
            yield f"{base}-GGUF:{profile.quant}"


def closest(name: str, known: Collection[str]) -> list[str]:
    """The known names most like `name`, best first. Anybody can ask for a name that is none, as often as he likes, and
    a close look at 2,000 names takes 50 ms: only those that share most pairs of letters are looked at closely (1 ms).
    """
    if len(known) > SHORTLIST:
        wanted = _pairs(name)
        known = nlargest(SHORTLIST, known, key=lambda k: len(wanted & _pairs_of_known(k)))
    return nearest(name, list(known))


def _pairs(name: str) -> frozenset[str]:
    lower = name.lower()
    return frozenset(lower[i : i + 2] for i in range(len(lower) - 1))


_pairs_of_known = lru_cache(maxsize=8192)(_pairs)  # not for what callers ask: they would push the known ones out
