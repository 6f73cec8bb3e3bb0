"""Ways of routing side by side: the gateway's own, least load, a tree as SGLang's router has it, a consistent hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from statistics import mean
from typing import Final

import xxhash

from bench.fleet.intervals import ratio, spread
from bench.measure import table
from helexa.cortex.prefixes import Prefixes
from helexa.cortex.simulate.conversations import mix
from helexa.cortex.simulate.serving import Asked, Engine, LeastLoad, Ours, Rule, Served, Serving, ServingReplica

SECONDS: Final = 3_600.0
WARM_S: Final = 600.0

# At each load: tokens and times to the first token against least load's, the busiest replica's share.
AIMS: Final = {0.3: (0.30, 0.5, 0.6, 1.30), 0.6: (0.40, None, None, 1.30)}
BEATEN_BY_TREE: Final = 1.05


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
            longest = max(held.values(), default=0.0)
            if held and longest >= self._share * prompt.weight:
                # Which of several its router finds first is chance, and here the seed's.
                chosen = self._rng.choice([r for r in replicas if held.get(r) == longest])
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


def show(seeds: Sequence[int]) -> None:
    """3. The prefix mix: three replicas with a cache of 50,000 tokens, three conversations in ten agents."""
    engine = Engine()
    rows, absolute, kept = [], [], []
    for load, aims in AIMS.items():
        rate = rate_for(load, engine, replicas=3, agents=0.3)
        runs: dict[str, list[Served]] = {name: [] for name in RULES}
        for seed in seeds:
            for name, make in RULES.items():
                runs[name].append(serve(make(seed), engine, rate, replicas=3, agents=0.3, seed=seed))
        least = runs["least load"]
        for name, found in runs.items():
            if found is not least:
                figures = [ratio(found, least, of) for of in (_tokens, _p50, _p99)] + [
                    spread(found, lambda r: r.busiest)
                ]
                told = [
                    f"{f} (<= {aim})" if aim and name == "ours" else f for f, aim in zip(figures, aims, strict=True)
                ]
                rows.append([f"{load:.0%}", name, *told])
            absolute.append(
                [
                    f"{load:.0%}",
                    name,
                    f"{mean(r.requests for r in found):,.0f}",
                    f"{mean(r.prompt_tokens / r.requests for r in found):,.0f}",
                    f"{mean(map(_tokens, found)):,.0f}",
                    f"{mean(map(_p50, found)):.3f}",
                    f"{mean(map(_p99, found)):.2f}",
                    f"{mean(r.busiest for r in found):.2f}",
                    f"{mean(r.prefill_busy for r in found):.0%}",
                ]
            )
        kept.append(f"at {load:.0%} {ratio(runs['ours'], runs['tree'], _tokens)} (<= {BEATEN_BY_TREE})")
    print("Against least load: means over the seeds with their 95 % intervals.\n")
    table(["load", "rule", "tokens computed", "p50 first token", "p99 first token", "busiest replica's share"], rows)
    print(f"\nTokens computed, ours by the tree's: {'; '.join(kept)}.\n")
    head = ["load", "rule", "requests", "prompt", "computed", "p50 s", "p99 s", "busiest", "prefill busy"]
    table(head, absolute)
    print()


def _tokens(served: Served) -> float:
    return served.computed / served.requests


def _p50(served: Served) -> float:
    return served.within_s(0.5)


def _p99(served: Served) -> float:
    return served.within_s(0.99)
