"""What the shipped rules are compared with: they know the future, or place otherwise. Never used by the gateway."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from helexa.cortex import placement
from helexa.cortex.eviction import Policy, Resident
from helexa.cortex.plans import NodeView, NoPlan, Plan, Wanted
from helexa.cortex.simulate.trace import Request


def clairvoyant(requests: Sequence[Request]) -> Policy:
    """Belady's: what is needed again last goes first. Optimal for equal sizes in one pool, served in order; else a
    heuristic that happens to know the future."""
    times: dict[str, list[float]] = {}
    for request in requests:
        times.setdefault(request.model, []).append(request.t)

    def score(resident: Resident, now: float) -> float:
        uses = times.get(resident.model, [])
        at = bisect_right(uses, now)
        return 1.0 / max(uses[at] - now, 1e-3) if at < len(uses) else 0.0

    return Policy("clairvoyant", score)


def best_fit(
    nodes: Iterable[NodeView], wanted: Wanted, policy: Policy, now: float, *, drain: bool = False
) -> Plan | NoPlan:
    """Where the least room is left over, whatever has to go there for it."""
    every = placement.weigh(nodes, wanted, policy, now, drain=drain)
    plans = [found for found in every if isinstance(found, Plan)]
    if plans:
        return min(plans, key=lambda p: (bool(p.victims), p.left_mb, p.node))
    return NoPlan(wanted.model, tuple(found for found in every if not isinstance(found, Plan)))
