"""Ways of routing side by side: the gateway's own, least load, a tree as SGLang's router has it, a consistent hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from statistics import mean
from typing import Final

import xxhash

from helexa.cortex.prefixes import Prefixes
from helexa.cortex.simulate.conversations import mix
from helexa.cortex.simulate.serving import Asked, Engine, LeastLoad, Ours, Rule, Served, Serving, ServingReplica

SECONDS: Final = 3_600.0
WARM_S: Final = 600.0


class Tree:
    """Cache-aware routing as SGLang's router does it: where the load is out of balance (the longest queue is longer
    than the shortest by `absolute` and by the factor `relative`), the shortest queue. Else the replica with the longest
    match, where that is at least `share` of the prompt; else the one with the smallest tree."""

    def __init__(self, seed: int, *, share: float = 0.3, absolute: int = 64, relative: float = 1.5) -> None:
        self._rng = Random(seed)
        self._share, self._absolute, self._relative = share, absolute, relative
        self._tree: Prefixes[ServingReplica] = Prefixes()

    def choose(self, asked: Asked, replicas: Sequence[ServingReplica], now: float) -> ServingReplica:
        loads = [r.inflight for r in replicas]
        prompt = asked.prompt
        if max(loads) - min(loads) > self._absolute and max(loads) > self._relative * min(loads):
            chosen = min(replicas, key=lambda r: r.inflight)
        else:
            held = self._tree.match(prompt, len(replicas))
            best = max(held, key=lambda r: held[r], default=None)
            if best is not None and held[best] >= self._share * prompt.weight:
                chosen = best
            else:
                chosen = min(replicas, key=lambda r: self._tree.sizes.get(r, 0.0))
        self._tree.note(chosen, prompt, 2**26)
        return chosen

    def ended(self, asked: Asked, replica: ServingReplica, now: float) -> None:
        pass


class ConsistentHash:
    """Each conversation has its replica, whatever that has to do (rendezvous hashing of the conversation's key)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, asked: Asked, replicas: Sequence[ServingReplica], now: float) -> ServingReplica:
        key = asked.conversation
        return max(replicas, key=lambda r: xxhash.xxh3_64_intdigest(f"{self._seed}/{key}/{r.node.name}".encode()))

    def ended(self, asked: Asked, replica: ServingReplica, now: float) -> None:
        pass


RULES: Final[dict[str, Callable[[int], Rule]]] = {
    "least load": LeastLoad,
    "ours": Ours,
    "tree": Tree,
    "hash": ConsistentHash,
}


def rate_for(load: float, engine: Engine, *, replicas: int, agents: float) -> float:
    """Conversations a second by which prompts keep the replicas busy for `load` of the time under least load. Found
    by halving, on seeds of its own."""
    low, high = 0.0, 1.0 * replicas
    for _ in range(12):
        rate = (low + high) / 2
        found = [serve(LeastLoad(s), engine, rate, replicas=replicas, agents=agents, seed=s) for s in (901, 902, 903)]
        if mean(f.prefill_busy for f in found) < load:
            low = rate
        else:
            high = rate
    return low


def serve(rule: Rule, engine: Engine, rate: float, *, replicas: int, agents: float, seed: int) -> Served:
    talks = mix(rate, SECONDS, Random(f"mix/{seed}"), agents=agents)
    return Serving(talks, rule, engine, replicas=replicas, seconds=SECONDS, warm_s=WARM_S).run()
