"""Where a model can be loaded, and the making of room for it: placements over the survey of the fleet, with what has to
be asked of nodes before and done on them after.

What a model needs is asked of a node of each make before the first plan, and of the chosen node before anything is
unloaded there: a file that is not there, or is not whole, must not cost others their place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Final

from helexa.core import logs
from helexa.core.errors import Conflict, HelexaError
from helexa.core.lifecycle import Estimate, ModelInfo, ModelStatus
from helexa.cortex import load_failures, placement, swapper
from helexa.cortex.decisions import NODES_SHOWN, Decisions, Evidence, Whom
from helexa.cortex.eviction import Policy
from helexa.cortex.explain import why_here
from helexa.cortex.fleet import Fleet
from helexa.cortex.needs import Make
from helexa.cortex.nodes import Node
from helexa.cortex.orders import Orders, status_on
from helexa.cortex.plans import Bar, NodeView, NoPlan, Plan, Reason, Wanted
from helexa.cortex.standing import UNDER_WAY
from helexa.cortex.survey import Survey, make_of
from helexa.cortex.swapper import Failure, Kind

log = logs.get("cortex.placer")

LOOK_AGAIN_S: Final = 1.0  # for room, while everything that may go is in use; news of it come sooner
STRANGERS_S: Final = 5.0  # how long room is waited for that only processes of others, or nobody, could give back
DRAIN_S: Final = 30.0  # what requests to a victim get to finish
IDLE_DRAIN_S: Final = 1.0  # and where we know of none: one may have ended here that the node is still closing
ESTIMATE_LASTS_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a placement comes to; nothing is promised by it. One of follows, asks and answer is there.

    follows: a load that is under way there; asks: a node of which nobody knows what the model needs
    nodes, views, wanted: what was asked; drain: models in use may be victims in `answer`
    """

    nodes: Sequence[Node]
    views: Sequence[NodeView]
    wanted: Wanted
    follows: Node | None = None
    asks: Node | None = None
    answer: Plan | NoPlan | None = None
    drain: bool = False


class Placer:
    def __init__(self, fleet: Fleet, survey: Survey, orders: Orders, policy: Policy, decisions: Decisions) -> None:
        self._fleet = fleet
        self._survey = survey
        self._orders = orders
        self._policy = policy
        self._decisions = decisions
        self._evidence: dict[str, tuple[str, Evidence]] = {}  # model -> the node that was chosen last, and why
        self._estimated_at: dict[tuple[str, Make], float] = {}
        self._checked_at: dict[tuple[str, str], float] = {}

    def find(self, command: swapper.Place) -> Found:
        """1. Where a load is under way. 2. The plan that costs least. 3. Nodes of which nobody knows what it needs:
        where most room is; the node will tell. 4. With models in use, which then have to finish. 5. Nowhere."""
        model, now = command.model, asyncio.get_running_loop().time()
        holders = [(node, info) for node, info in self._fleet.holders(model) if node.name not in command.avoid]
        nodes = [node for node, _ in holders]
        wanted = self._survey.wanted(model, nodes)
        under_way = [node for node in nodes if status_on(node, model) in UNDER_WAY]
        if under_way:
            return Found(nodes, (), wanted, follows=min(under_way, key=lambda n: n.state != "up"))
        views = self._survey.views([n.name for n in nodes], now)
        answer = placement.plan(views, wanted, self._policy, now)
        unknown = [h for h in holders if wanted.need is None and h[0].name not in wanted.need_on]
        if isinstance(answer, NoPlan) and unknown:
            return Found(nodes, views, wanted, asks=min(unknown, key=preference)[0])
        if isinstance(answer, NoPlan) and command.drain:
            drained = placement.plan(views, wanted, self._policy, now, drain=True)
            if isinstance(drained, Plan):
                return Found(nodes, views, wanted, answer=drained, drain=True)
        return Found(nodes, views, wanted, answer=answer)

    def place(self, command: swapper.Place, since: float, whom: Whom) -> swapper.Placed | swapper.NoPlace:
        """As `find`, and what it comes to is promised."""
        model = command.model
        self._survey.take_back(model)
        found = self.find(command)
        if found.follows is not None:
            return swapper.Placed(model, found.follows.name)
        if found.asks is not None:
            name = found.asks.name
            why = f"what {model} needs is not known; {name} has the most room, and will tell"
            self._evidence[model] = (name, Evidence(why))
            return swapper.Placed(model, name)
        plan = found.answer
        if not isinstance(plan, Plan):
            assert plan is not None
            return self._no_place(plan, found.wanted, found.nodes, since, whom)
        self._survey.promise(plan)
        self._evidence[model] = (plan.node, self.evidence(found))
        if plan.victims:
            log.info(
                "room is made", model=model, node=plan.node, victims=list(plan.victims), price=round(plan.price, 6),
                drains=list(plan.drains), need_mb=plan.need.total_mb, by=plan.need.source,
            )  # fmt: skip
        return swapper.Placed(model, plan.node, plan.victims, plan.drains)

    def evidence(self, found: Found) -> Evidence:
        """What else could have been done. Of a large fleet, the nodes with the most room are looked at."""
        plan, wanted, views = found.answer, found.wanted, found.views
        assert isinstance(plan, Plan)
        if len(views) > NODES_SHOWN:
            views = nlargest(NODES_SHOWN - 1, views, key=lambda v: sum(d.room_mb for d in v.devices))
            if all(v.name != plan.node for v in views):
                views = [*views, next(v for v in found.views if v.name == plan.node)]
        now = asyncio.get_running_loop().time()
        weighed = placement.weigh(views, wanted, self._policy, now, drain=found.drain)
        return Evidence(why_here(plan, weighed), plan, weighed, len(found.views))

    def evidence_for(self, model_id: str, node: str) -> Evidence | None:
        """Of the plan that was last made for this model, if it was for this node."""
        chosen, evidence = self._evidence.get(model_id, (None, None))
        return evidence if chosen == node else None

    def forget(self, model_id: str) -> None:
        self._evidence.pop(model_id, None)

    def on_node(self, model_id: str, node: Node) -> Plan | Reason:
        """The plan for this node; nothing is promised."""
        now = asyncio.get_running_loop().time()
        views, wanted = self._survey.views([node.name], now), self._survey.wanted(model_id, [node])
        if not views:
            return Reason(node.name, Bar.AWAY, "is no longer in cortex.toml")
        plan = placement.on_node(views[0], wanted, self._policy, now)
        if isinstance(plan, Plan):
            self._evidence[model_id] = (node.name, self.evidence(Found([node], views, wanted, answer=plan)))
        return plan

    def copy(self, model_id: str, *, displaces: bool) -> Plan | None:
        """Where another copy could go; without `displaces` only into free room. Promised."""
        now = asyncio.get_running_loop().time()
        nodes = [
            node for node, _ in self._fleet.holders(model_id) if status_on(node, model_id) is not ModelStatus.LOADED
        ]
        wanted, views = self._survey.wanted(model_id, nodes), self._survey.views([n.name for n in nodes], now)
        plan = placement.plan(views, wanted, self._policy, now)
        if not isinstance(plan, Plan) or (plan.victims and not displaces):
            return None
        self._survey.promise(plan)
        self._evidence[model_id] = (plan.node, self.evidence(Found(nodes, views, wanted, answer=plan)))
        return plan

    def _no_place(
        self, found: NoPlan, wanted: Wanted, nodes: Sequence[Node], since: float, whom: Whom
    ) -> swapper.NoPlace:
        """Waiting helps where the model would fit once all that may go has gone."""
        again_at = self.again_at(found, wanted, nodes, since)
        if again_at is not None:
            for node in nodes:  # others' requests are known from polls only; they may be over
                if any(replica.others for replica in node.replicas.values()):
                    self._fleet.doubt(node)
            self._decisions.note("wait", "no node has room now", whom, model=found.model, against=found.reasons)
        return swapper.NoPlace(found.model, again_at, load_failures.of_reasons(found.reasons))

    def again_at(self, found: NoPlan, wanted: Wanted, nodes: Sequence[Node], since: float) -> float | None:
        """When room may have come; None: it will not."""
        now, names = asyncio.get_running_loop().time(), [n.name for n in nodes]
        later = self._survey.may_fit_later(names, wanted.priority, by_class=self._policy.by_class, now=now)
        might = isinstance(placement.plan(later, wanted, self._policy, now), Plan)
        if might or (any(r.bar is Bar.NOT_NOW for r in found.reasons) and now - since < STRANGERS_S):
            return max(now + 0.02, min(now + LOOK_AGAIN_S, found.again_at or now + LOOK_AGAIN_S))
        return None

    # needs

    def unknown(self, model_id: str, nodes: Iterable[Node]) -> list[Node]:
        """A node of each make where it is not known what the model takes; one that has the file before others."""
        spec, now = self._survey.spec(model_id), asyncio.get_running_loop().time()
        of_make: dict[Make, Node] = {}
        for node in sorted(nodes, key=lambda n: (model_id not in n.models, n.state != "up")):
            make = make_of(node)
            asked_at = self._estimated_at.get((spec, make))
            if self._survey.needs.on(spec, make) is None and (asked_at is None or now - asked_at > ESTIMATE_LASTS_S):
                of_make.setdefault(make, node)
        return list(of_make.values())

    async def ask_needs(self, model_id: str, nodes: Iterable[Node]) -> None:
        await asyncio.gather(*(self._ask_need(model_id, node) for node in self.unknown(model_id, nodes)))

    async def _ask_need(self, model_id: str, node: Node) -> Failure | None:
        """The node's estimate is remembered; its reason, where it can never serve the model, returned."""
        spec, make = self._survey.spec(model_id), make_of(node)
        said = await self._orders.estimate(model_id, node)
        self._estimated_at[spec, make] = asyncio.get_running_loop().time()
        if isinstance(said, Estimate):
            self._survey.needs.estimated(spec, make, node.name, said)
            return None
        return said if said.kind is Kind.NEVER else None

    # room

    async def clear(self, model_id: str, node: Node, victim: str, whom: Whom, *, drain: bool) -> Failure | None:
        """1. Could the node load it at all, and is the need as the plan had it? 2. The victim goes. 3. A fresh look."""
        key, loop = (self._survey.spec(model_id), node.name), asyncio.get_running_loop()
        if loop.time() - self._checked_at.get(key, -ESTIMATE_LASTS_S) >= ESTIMATE_LASTS_S:
            before = self._survey.needs.on(key[0], make_of(node))
            never = await self._ask_need(model_id, node)
            if never is not None:
                return never
            self._checked_at[key] = loop.time()
            if self._survey.needs.on(key[0], make_of(node)) != before:
                return None  # a new plan, before anything is unloaded
        evidence = self.evidence_for(model_id, node.name)
        why = evidence.why if evidence is not None else f"room for {model_id}"
        self._decisions.note("evict", why, whom, model=victim, node=node.name, wanted=model_id, evidence=evidence)
        try:
            await self._orders.unload(victim, node, drain_s=DRAIN_S if drain else IDLE_DRAIN_S)
        except Conflict as err:
            self._decisions.note("stays", err.message, whom, model=victim, node=node.name, wanted=model_id)
            log.info("a victim is in use", model=victim, node=node.name, wanted=model_id)
            return Failure(node.name, Kind.BUSY, err.message)
        except HelexaError as err:
            return Failure(node.name, Kind.GONE, err.message)
        await self._orders.look(node)
        return None


def preference(candidate: tuple[Node, ModelInfo | None]) -> tuple[bool, bool, bool, bool, int]:
    node, info = candidate
    status = info.parsed_status if info is not None else None
    # free room that is unknown sorts with none: such a node is asked last, not never
    return (
        status not in UNDER_WAY,
        node.state != "up",
        status is ModelStatus.UNLOADING,
        info is None,
        -(node.free_mb or 0),
    )
