"""What would happen now to a request for a model, and why: GET /fleet/plan.

The same functions are asked that decide: the router, the swapper's step and the placement, over the views that they
get. Nothing is promised, ordered or remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil
from random import Random
from typing import Literal

import msgspec

from helexa.core.errors import Dialect, HelexaError, status_for
from helexa.cortex import load_failures, placement, router, swapper
from helexa.cortex.admission import Admission, Prospect
from helexa.cortex.decisions import NODES_SHOWN, Weighed, weighed
from helexa.cortex.eviction import Policy
from helexa.cortex.fallbacks import Outlook, first_in_time, loaded
from helexa.cortex.fleet import Fleet
from helexa.cortex.nodes import Node, Replica, why_not_up
from helexa.cortex.placer import Found, Placer
from helexa.cortex.plans import NodeView, NoPlan, Plan
from helexa.cortex.standing import Standing
from helexa.cortex.swapper import Phase

Action = Literal["serve", "load", "wait", "refuse"]


class _Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Values of one answer in JSON."""


class OneReplica(_Answer, frozen=True):
    node: str
    state: str
    inflight: int
    others: int = 0  # requests there that are not this gateway's
    full: bool = False  # it takes no more, by its `limits`
    chosen: bool = False


class OneDevice(_Answer, frozen=True):
    index: int
    mb: int


class OneVictim(_Answer, frozen=True):
    """score: what it adds to the price. drains: it is in use, and finishes first."""

    model: str
    score: float
    mb: int
    idle_s: float
    uses: float = 0.0
    copies: int = 1
    drains: bool = False


class Placement(_Answer, frozen=True):
    """One load. victims: in the order in which they would go. seconds: of the load alone, where that is known."""

    node: str
    devices: list[OneDevice] = []
    need_mb: int | None = None
    need_by: str | None = None
    victims: list[OneVictim] = []
    price: float | None = None
    seconds: float | None = None
    left_mb: int | None = None


class Refusal(_Answer, frozen=True):
    status: int
    code: str
    message: str
    retry_after_s: int | None = None


class Foreseen(_Answer, frozen=True):
    """then: what would be done for a request that waits, once models in use may have to finish. candidates: of an alias
    that lists several models, those that are known, the preferred first."""

    model: str
    action: Action
    why: str
    node: str | None = None
    replicas: list[OneReplica] = []
    load: Placement | None = None
    waiting: int = 0
    then: Placement | None = None
    candidates: list[str] = []
    error: Refusal | None = None
    weighed: list[Weighed] = []
    not_shown: int = 0


class Foresight:
    """state, standing, error, outlook: the loader's own, as they are when it is asked."""

    def __init__(
        self,
        fleet: Fleet,
        placer: Placer,
        policy: Policy,
        *,
        wait_s: float,
        state: Callable[[], swapper.State],
        standing: Callable[[str], Standing],
        error: Callable[[swapper.Refuse], HelexaError],
        outlook: Callable[[str], Outlook],
        admission: Admission,
    ) -> None:
        self._fleet = fleet
        self._placer = placer
        self._policy = policy
        self._wait_s = wait_s
        self._state = state
        self._standing = standing
        self._error = error
        self._outlook = outlook
        self._admission = admission

    async def of_first(self, candidates: Sequence[str]) -> Foreseen:
        """Of the model that a request would begin with: the first that can serve it in its time."""
        if len(candidates) == 1:
            return await self.of(candidates[0])
        now, replicas = asyncio.get_running_loop().time(), self._fleet.replicas
        outlooks = [loaded(replicas(m), now) if replicas(m) else self._outlook(m) for m in candidates]
        foreseen = await self.of(candidates[first_in_time(outlooks, self._wait_s) or 0])
        return msgspec.structs.replace(foreseen, candidates=list(candidates))

    async def of(self, model: str) -> Foreseen:
        """1. Loaded: served, or what bounds say. 2. Nodes are asked what it needs, as a load would ask them. 3. Others
        wait for it, or too many. 4. A place for it. 5. None: refused, or for later."""
        has_bounds = self._fleet.is_bounded(model)
        full = self._admission.full_nodes(model) if has_bounds else ()
        served = serving(model, self._fleet.replicas(model), full)
        if served is not None:
            return bounded(served, self._admission.prospect(model)) if has_bounds else served
        await self._placer.ask_needs(model, [node for node, _ in self._fleet.holders(model)])
        now, policy, before = asyncio.get_running_loop().time(), self._policy, self._state()
        state, commands = swapper.step(before, swapper.Asked(model, "foreseen", now + self._wait_s), now)
        match commands:
            case [swapper.Refuse() as refusal]:
                return refusing(model, self._error(refusal))
            case [swapper.Place() as place]:
                found = self._placer.find(place)
            case _:
                return pursued(model, before.wanted[model], self._standing(model))
        others = not_asked(self._fleet, model, before, found.nodes, now)
        foreseen = loading(model, found, self._placer, policy, now)
        if foreseen is not None:
            return with_others(foreseen, others)
        assert isinstance(found.answer, NoPlan)
        again_at = self._placer.again_at(found.answer, found.wanted, found.nodes, now)
        reasons = load_failures.of_reasons(found.answer.reasons)
        _, commands = swapper.step(state, swapper.NoPlace(model, again_at, reasons), now)
        match commands:
            case [swapper.Refuse() as refusal]:
                names = {other.node for other in others}
                told = [weighed(failure) for failure in refusal.failures if failure.node not in names]
                foreseen = refusing(model, self._error(refusal), told)
            case _:
                later = self._placer.find(replace(place, drain=True))
                foreseen = resting(model, found, later, policy, state.drain_after_s, now)
        return with_others(foreseen, others)


def serving(model: str, replicas: Sequence[Replica], full: Sequence[str] = ()) -> Foreseen | None:
    """It is loaded somewhere. None: nowhere that can be asked. full: nodes that take no more, which come last."""
    chosen = router.choose(replicas, full, Random(0)) or router.choose(replicas, (), Random(0))
    if chosen is None:
        return None
    shown = [
        OneReplica(
            node=r.node.name,
            state=r.node.state,
            inflight=r.inflight,
            others=r.others,
            full=r.node.name in full,
            chosen=r is chosen,
        )
        for r in replicas[:NODES_SHOWN]
    ]
    if len(replicas) == 1:
        why = f"it is loaded there, with {_requests(chosen.inflight + chosen.others)}"
    else:
        why = (
            f"of {len(replicas)} replicas it has the fewest requests in flight ({chosen.inflight}); a prompt goes "
            "where its first token is expected first (header x-helexa-explain: 1 tells)"
        )
    more = max(0, len(replicas) - NODES_SHOWN)
    return Foreseen(model=model, action="serve", why=why, node=chosen.node.name, replicas=shown, not_shown=more)


def bounded(served: Foreseen, prospect: Prospect | None) -> Foreseen:
    """The same, where bounds hold a request back."""
    if prospect is None:
        return served
    replicas = [msgspec.structs.replace(replica, chosen=False) for replica in served.replicas]
    if prospect.refusal is not None:
        foreseen = refusing(served.model, prospect.refusal)
    else:
        why = f"it is loaded, but {prospect.why}; it would wait for a place"
        foreseen = Foreseen(model=served.model, action="wait", why=why)
    return msgspec.structs.replace(
        foreseen, replicas=replicas, waiting=prospect.ahead, not_shown=foreseen.not_shown + served.not_shown
    )


def pursued(model: str, pursuit: swapper.Pursuit, standing: Standing) -> Foreseen:
    """Others wait for it already, and one more would with them."""
    count = len(pursuit.waiters)
    eta = f", about {ceil(standing.eta_s)} s are left" if standing.eta_s is not None else ""
    match pursuit.phase:
        case Phase.LOADING:
            why = f"it is {standing.doing} on {pursuit.node}{eta}"
        case Phase.CLEARING:
            why = f"room is made for it on {pursuit.node}"
        case _:
            why = "a node with room for it is looked for"
    told = [*pursuit.tried, *pursuit.blocked]
    return Foreseen(
        model=model,
        action="wait",
        why=f"{why}; {_requests(count)} wait{'s' if count == 1 else ''} for it",
        node=pursuit.node,
        waiting=count,
        weighed=[weighed(failure) for failure in told[:NODES_SHOWN]],
        not_shown=max(0, len(told) - NODES_SHOWN),
    )


def refusing(model: str, error: HelexaError, against: Sequence[Weighed] = ()) -> Foreseen:
    refusal = Refusal(
        status=status_for(error, Dialect.OPENAI),
        code=error.code,
        message=error.message,
        retry_after_s=error.retry_after_s,
    )
    return Foreseen(
        model=model,
        action="refuse",
        why=error.message,
        error=refusal,
        weighed=list(against[:NODES_SHOWN]),
        not_shown=max(0, len(against) - NODES_SHOWN),
    )


def loading(model: str, found: Found, placer: Placer, policy: Policy, now: float) -> Foreseen | None:
    """What a placement comes to; None where that is no place at all."""
    if found.follows is not None:
        name = found.follows.name
        return Foreseen(model=model, action="wait", why=f"it is being loaded on {name} already", node=name)
    if found.asks is not None:
        name = found.asks.name
        why = f"what {model} needs is not known; {name} has the most room, and will tell"
        return Foreseen(model=model, action="load", why=why, node=name, load=Placement(node=name))
    plan = found.answer
    if not isinstance(plan, Plan):
        return None
    evidence = placer.evidence(found)
    return Foreseen(
        model=model,
        action="load",
        why=evidence.why,
        node=plan.node,
        load=described(plan, found.views, policy, now),
        weighed=[weighed(one) for one in evidence.weighed],
        not_shown=max(0, evidence.nodes - len(evidence.weighed)),
    )


def resting(model: str, found: Found, later: Found, policy: Policy, drain_after_s: float, now: float) -> Foreseen:
    """No node has room now, and one may have it. later: the placement once models in use may have to finish."""
    none, then = found.answer, later.answer
    assert isinstance(none, NoPlan)
    why = "no node has room now, and a request would wait for it"
    plan = None
    if isinstance(then, Plan):
        plan = described(then, later.views, policy, now)
        names = ", ".join(then.drains)
        why += f"; after {drain_after_s:g} s {names} on {then.node} would have to finish and go"
    return Foreseen(
        model=model,
        action="wait",
        why=why,
        then=plan,
        weighed=[weighed(reason) for reason in none.reasons[:NODES_SHOWN]],
        not_shown=max(0, len(none.reasons) - NODES_SHOWN),
    )


def described(plan: Plan, views: Iterable[NodeView], policy: Policy, now: float) -> Placement:
    [view] = [view for view in views if view.name == plan.node]
    held = {resident.model: resident for resident in view.residents}
    victims = []
    for name in plan.victims:
        resident = held[name]
        victims.append(
            OneVictim(
                model=name,
                score=policy.price(resident, now)[1],
                mb=resident.mb,
                idle_s=round(max(0.0, now - resident.last_used), 1),
                uses=round(resident.uses, 3),
                copies=resident.copies,
                drains=name in plan.drains,
            )
        )
    return Placement(
        node=plan.node,
        devices=[OneDevice(index=i, mb=mb) for i, mb in zip(plan.devices, plan.parts_mb, strict=True)],
        need_mb=plan.need.total_mb,
        need_by=plan.need.source,
        victims=victims,
        price=plan.price,
        seconds=None if plan.seconds is None else round(plan.seconds, 1),
        left_mb=plan.left_mb,
    )


def not_asked(fleet: Fleet, model: str, state: swapper.State, asked: Iterable[Node], now: float) -> list[Weighed]:
    """The other nodes of the fleet, and why they are not asked at all."""
    names = {node.name for node in asked}
    failed = {r.failure.node: r for r in state.resting(model, now)}
    profile = fleet.profiles.get(model)
    found = []
    for node in fleet.nodes.values():
        if node.name in names:
            continue
        if profile is not None and profile.pinned_on and node.name not in profile.pinned_on:
            reason = f"pinned_on allows only {', '.join(profile.pinned_on)}"
        elif node.state not in placement.ALIVE:
            reason = f"is {node.state} ({why_not_up(node)})"
        elif (rests := failed.get(node.name)) is not None:
            reason = f"{rests.failure.reason.rstrip('.')}; it is tried again in {ceil(rests.until - now)} s"
        elif profile is None:
            reason = f"does not have {model} on its disk"
        else:
            reason = "has refused it a moment ago"
        found.append(Weighed(node=node.name, reason=reason))
    return found


def with_others(foreseen: Foreseen, others: Sequence[Weighed]) -> Foreseen:
    room = NODES_SHOWN - len(foreseen.weighed)
    return msgspec.structs.replace(
        foreseen,
        weighed=[*foreseen.weighed, *others[:room]],
        not_shown=foreseen.not_shown + max(0, len(others) - room),
    )


def _requests(count: int) -> str:
    return "no request" if not count else f"{count} request{'' if count == 1 else 's'}"
