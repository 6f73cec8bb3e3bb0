"""What models took and how long their loads did, by profile and by the make of the node. Pure; values from the loader.

A profile is its `spec_hash`: another quant or context is another need. A make is the list of a node's devices: what a
model took on one node it will take on its like. Newest first: what a load held, or what a node said that it needs when
it refused one; else the node's estimate from the file's header; else `vram_mb`; else nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from helexa.core.lifecycle import Estimate
from helexa.cortex.plans import Need, Split

Make = tuple[tuple[str, int | None], ...]  # (name, total MB) of each device


@dataclass(slots=True)
class _Known:
    """least_mb: what was not enough, and one more; until a load succeeds."""

    need: Need | None = None
    least_mb: int = 0
    load_s: dict[str, float] = field(default_factory=dict)  # by node


class Needs:
    def __init__(self) -> None:
        self._by_make: dict[str, dict[Make, _Known]] = {}  # profile -> make
        self._latest: dict[str, Need] = {}

    def on(self, spec: str, make: Make) -> Need | None:
        known = self._by_make.get(spec, {}).get(make)
        if known is None:
            return None
        if known.least_mb > (known.need.total_mb if known.need is not None else 0):
            return Need((known.least_mb,), "estimate")
        return known.need

    def anywhere(self, spec: str) -> Need | None:
        """On whatever make it was met last."""
        return self._latest.get(spec)

    def load_s(self, spec: str, make: Make, node: str) -> float | None:
        """The latest load on this node; else on one of its make."""
        known = self._by_make.get(spec, {}).get(make)
        if known is None or not known.load_s:
            return None
        return known.load_s.get(node, next(reversed(known.load_s.values())))

    def took(self, spec: str, make: Make, memory_mb: Mapping[int, int]) -> None:
        """Loaded, and holding this, by device."""
        self._known(spec, make).least_mb = 0
        self._learn(spec, make, Need(tuple(mb for _, mb in sorted(memory_mb.items())), "measured"))

    def estimated(self, spec: str, make: Make, node: str, said: Estimate) -> None:
        """A node's estimate. What a load really took counts more, unless the estimate is what stands in its way."""
        before = self._known(spec, make).need
        parts = sorted(said.devices, key=lambda device: device.index)
        split = Split(sum(d.weights_mb for d in parts), sum(d.kv_mb for d in parts), sum(d.overhead_mb for d in parts))
        ways = tuple(said.ways) if said.never else ()
        need = Need(tuple(d.need_mb for d in parts), "estimate", split, ways, node)
        if before is None or before.source != "measured" or need.total_mb > before.total_mb:
            self._learn(spec, make, need)

    def refused(self, spec: str, make: Make, least_mb: int) -> None:
        """A node did not load it into less than this: true of its make, and no guess for others."""
        known = self._known(spec, make)
        known.least_mb = max(known.least_mb, least_mb)

    def lasted(self, spec: str, make: Make, node: str, seconds: float) -> None:
        known = self._known(spec, make)
        known.load_s.pop(node, None)
        known.load_s[node] = seconds

    def _learn(self, spec: str, make: Make, need: Need) -> None:
        if need.total_mb > 0:
            self._known(spec, make).need = need
            self._latest[spec] = need

    def _known(self, spec: str, make: Make) -> _Known:
        return self._by_make.setdefault(spec, {}).setdefault(make, _Known())
