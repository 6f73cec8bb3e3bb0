"""Which replica serves a request. Pure: the model's live replica list in, one of them out. No clock, no I/O.

The list belongs to the fleet, which changes it between calls; nothing is copied here, since a view built for each
request would cost more than the decision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helexa.cortex.fleet import Replica


def choose(replicas: Sequence[Replica], tried: Collection[str], rng: Random) -> Replica | None:
    """The replica with the fewest requests in flight; None where every one was tried.

    1. Nodes in `tried` (their names) are passed over: a request is not sent to the same failure twice.
    2. A node that is up comes before a suspect one, however busy it is.
    3. Of those, the fewest in flight; ties at random, each equally likely.
    """
    return _fewest(replicas, tried, rng, "up") or _fewest(replicas, tried, rng, "suspect")


def _fewest(replicas: Sequence[Replica], tried: Collection[str], rng: Random, state: str) -> Replica | None:
    # HOT, once per request and replica. Bench: bench/gateway.
    best: list[Replica] = []
    least = 0
    for replica in replicas:
        node = replica.node
        if node.state != state or (tried and node.name in tried):
            continue
        inflight = replica.inflight
        if not best or inflight < least:
            best, least = [replica], inflight
        elif inflight == least:
            best.append(replica)
    if len(best) > 1:
        return best[int(rng.random() * len(best))]
    return best[0] if best else None
