"""A collective whose time is added up, and the loader of shards that have one: known to every rank of a bench."""

from __future__ import annotations

import time
from typing import Any

from helexa.neuron.harness.torch.ranks import load_rank


class Clocked:
    """A collective that adds up the time in it. It costs two looks at the clock a call."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective
        self.rank, self.world_size = collective.rank, collective.world_size
        self.sums_s = self.gather_s = 0.0
        self.calls = 0

    def all_reduce(self, tensor: Any) -> None:
        began = time.perf_counter()
        self._collective.all_reduce(tensor)
        self.sums_s += time.perf_counter() - began
        self.calls += 1

    def gather(self, tensor: Any) -> Any:
        began = time.perf_counter()
        out = self._collective.gather(tensor)
        self.gather_s += time.perf_counter() - began
        return out


clocked: list[Clocked] = []


def load(spec: dict[str, Any], collective: Any, progress: Any) -> Any:
    if collective is None:
        return load_rank(spec, None, progress)
    clocked.append(Clocked(collective))
    return load_rank(spec, clocked[-1], progress)
