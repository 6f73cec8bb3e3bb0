"""Generated fleets, models and loads; everything follows from a seed.

W1 to W4 are the workloads by which placement and eviction are judged:

|    | fleet, models | arrivals                                                                    | requests |
|----|---------------|-----------------------------------------------------------------------------|----------|
| W1 | 3, 20         | Poisson 0.15/s, Zipf 1.0                                                    | 8,000    |
| W2 | 3, 20         | conversations of 12 (geometric), 20 s apart, day cycle, drift; Zipf 1.0, 0.22/s | 22,000 |
| W3 | 50, 200       | Poisson 5/s, Zipf 1.0                                                       | 30,000   |
| W4 | 50, 200       | as W2, Zipf 0.8, 5.7/s                                                      | 120,000  |

Models are 1 to 48 GB, log-uniform, size independent of popularity. A day's rate goes from 0.3 to 1.7 of its mean; each
hour a tenth as many pairs as there are models trade their places in the ranking, near ones mostly.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from math import exp, pi, sin
from random import Random
from typing import Final, TypeAlias

from helexa.cortex.simulate.trace import Request
from helexa.cortex.simulate.world import Model, NodeSpec

GB: Final = 1024
DAY_S: Final = 86_400.0
_TURNS: Final = 12
_MOST_TURNS: Final = 1_000_000  # of a conversation: its prefixes' ids begin there
_PAUSE_S: Final = 20.0
_DEVICES_GB: Final = (12, 16, 24, 32, 48, 64)
_NODE_GB: Final = 40  # on average, within a twentieth: 2 TB on fifty nodes


# The next turn of a conversation: when, which one, its model, its prompt, and which turn it is.
_Next: TypeAlias = tuple[float, int, str, int, int]


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    nodes: Sequence[NodeSpec]
    models: Sequence[Model]
    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """rate: requests a second. bursts: conversations; else each request is independent."""

    rate: float
    count: int
    zipf: float = 1.0
    bursts: bool = False


W: Final[dict[str, tuple[int, int, Arrivals]]] = {
    "W1": (3, 20, Arrivals(0.15, 8_000)),
    "W2": (3, 20, Arrivals(0.22, 22_000, bursts=True)),
    "W3": (50, 200, Arrivals(5.0, 30_000)),
    "W4": (50, 200, Arrivals(5.7, 120_000, zipf=0.8, bursts=True)),
}


def standard(name: str, seed: int) -> Workload:
    nodes, models, arrivals = W[name]
    rng = Random(f"{name}/{seed}")
    fleet = three_nodes() if nodes == 3 else drawn_nodes(nodes, rng)
    known = drawn_models(models, rng)
    return Workload(name, fleet, known, generate([m.id for m in known], arrivals, rng))


def three_nodes() -> list[NodeSpec]:
    return [
        NodeSpec("a", (24 * GB, 24 * GB), 2.0 * GB),
        NodeSpec("b", (48 * GB,), 3.0 * GB),
        NodeSpec("c", (12 * GB, 16 * GB), 1.0 * GB),
    ]


def drawn_nodes(count: int, rng: Random) -> list[NodeSpec]:
    """One or two equal devices each, drawn anew until the fleet has about its size."""
    while True:
        devices = [(rng.choice(_DEVICES_GB) * GB,) * rng.choice((1, 2)) for _ in range(count)]
        if abs(sum(map(sum, devices)) / (count * _NODE_GB * GB) - 1) < 0.05:
            break
    return [NodeSpec(f"n{at:02}", devices[at], rng.uniform(1, 3) * GB) for at in range(count)]


def drawn_models(count: int, rng: Random) -> list[Model]:
    """The first is asked for most, at the beginning."""
    return [Model(f"m{at:03}", int(GB * 48 ** rng.random())) for at in range(count)]


def generate(models: Sequence[str], arrivals: Arrivals, rng: Random) -> list[Request]:
    return _conversations(models, arrivals, rng) if arrivals.bursts else _poisson(models, arrivals, rng)


def _poisson(models: Sequence[str], arrivals: Arrivals, rng: Random) -> list[Request]:
    weights = _zipf(len(models), arrivals.zipf)
    t, requests = 0.0, []
    for _ in range(arrivals.count):
        t += rng.expovariate(arrivals.rate)
        requests.append(Request(t, models[_draw(weights, rng)], _prompt(rng), _output(rng)))
    return requests


def _conversations(models: Sequence[str], arrivals: Arrivals, rng: Random) -> list[Request]:
    weights = _zipf(len(models), arrivals.zipf)
    ranking = list(models)
    pending: list[_Next] = []
    requests: list[Request] = []
    start, talks, next_drift = 0.0, 0, 3600.0
    most = 1.7 * arrivals.rate / _TURNS
    while len(requests) < arrivals.count:
        # the next beginning, by thinning: candidates at the highest rate of the day, kept as the hour has it
        start += rng.expovariate(most)
        while pending and pending[0][0] <= start and len(requests) < arrivals.count:
            _take_turn(pending, requests, rng)
        while start >= next_drift:
            _drift(ranking, rng)
            next_drift += 3600.0
        if rng.random() * 1.7 < 1 + 0.7 * sin(2 * pi * start / DAY_S):
            talks += 1
            heappush(pending, (start, talks, ranking[_draw(weights, rng)], _prompt(rng), 1))
    return requests


def _take_turn(pending: list[_Next], requests: list[Request], rng: Random) -> None:
    t, talk, model, prompt, turn = heappop(pending)
    output = _output(rng)
    requests.append(Request(t, model, prompt, output, range(talk * _MOST_TURNS, talk * _MOST_TURNS + turn)))
    if rng.random() >= 1 / _TURNS:
        heappush(pending, (t + rng.expovariate(1 / _PAUSE_S), talk, model, prompt + output + 60, turn + 1))


def _drift(ranking: list[str], rng: Random) -> None:
    for _ in range(max(1, len(ranking) // 10)):
        at = rng.randrange(len(ranking))
        other = min(len(ranking) - 1, max(0, at + round(rng.gauss(0, len(ranking) / 10))))
        ranking[at], ranking[other] = ranking[other], ranking[at]


def _zipf(count: int, exponent: float) -> list[float]:
    """Cumulated."""
    return list(accumulate(1 / rank**exponent for rank in range(1, count + 1)))


def _draw(cumulated: list[float], rng: Random) -> int:
    return bisect(cumulated, rng.random() * cumulated[-1], 0, len(cumulated) - 1)


def _prompt(rng: Random) -> int:
    return int(400 * exp(rng.gauss(0, 0.8)))


def _output(rng: Random) -> int:
    return max(1, int(150 * exp(rng.gauss(0, 0.7))))
