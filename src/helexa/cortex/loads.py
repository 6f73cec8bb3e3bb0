"""The loads that are under way by this gateway's orders: each seen through from the order to its end, by one task that
all who want it share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from helexa.core import logs
from helexa.core.lifecycle import ModelStatus
from helexa.cortex.decisions import OPERATOR, UPKEEP, Decisions, Whom
from helexa.cortex.nodes import Node
from helexa.cortex.orders import Orders, status_on
from helexa.cortex.placer import Placer
from helexa.cortex.plans import Plan
from helexa.cortex.standing import UNDER_WAY
from helexa.cortex.survey import Survey, make_of, more_than
from helexa.cortex.swapper import Failure, Kind

log = logs.get("cortex.loads")

OPERATOR_STEPS: Final = 64  # unloads for one load that an operator ordered to a node


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One load that this gateway saw through. seconds: from the order to its end."""

    model: str
    node: str
    seconds: float
    error: str | None


class Loads:
    """on_load: called after each load that ended, failed ones too."""

    def __init__(self, survey: Survey, orders: Orders, placer: Placer, decisions: Decisions) -> None:
        self._survey = survey
        self._orders = orders
        self._placer = placer
        self._decisions = decisions
        self._tasks: dict[tuple[str, str], asyncio.Task[Failure | None]] = {}
        self._began: dict[tuple[str, str], float] = {}
        self.on_load: list[Callable[[LoadRecord], None]] = []

    def is_at(self, node: str) -> bool:
        """Is one under way there?"""
        return any(name == node for _, name in self._tasks)

    def began(self, model_id: str, node: str) -> float | None:
        """When it was ordered, or found under way; monotonic."""
        return self._began.get((model_id, node))

    async def stop(self) -> None:
        """They go on at their nodes, unfollowed."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ordered(self, model_id: str, node: Node) -> Failure | None:
        """On this node, by an operator's word: what is idle goes for it, as for a request."""
        for _ in range(OPERATOR_STEPS):
            if status_on(node, model_id) in UNDER_WAY | {ModelStatus.LOADED}:
                break
            await self._placer.ask_needs(model_id, [node])
            found = self._placer.on_node(model_id, node)
            if not isinstance(found, Plan) or not found.victims:
                break  # the node itself says what is wrong, if anything is
            if await self._placer.clear(model_id, node, found.victims[0], OPERATOR, drain=False) is not None:
                break
        return await self.see_through(model_id, node, OPERATOR)

    async def copy(self, model_id: str, node: Node) -> Failure | None:
        return await self.see_through(model_id, node, UPKEEP, "copy")

    async def see_through(
        self, model_id: str, node: Node, whom: Whom, what: Literal["load", "copy"] = "load"
    ) -> Failure | None:
        """One load on one node from order to end, shared by all who want it; a cancel leaves it going."""
        key = (model_id, node.name)
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(self._load_on(model_id, node, whom, what))
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return await asyncio.shield(task)

    async def _load_on(self, model_id: str, node: Node, whom: Whom, what: Literal["load", "copy"]) -> Failure | None:
        key = (model_id, node.name)
        began = self._began[key] = time.monotonic()  # the loop's own is of milliseconds
        is_ours = status_on(node, model_id) not in UNDER_WAY
        if is_ours:
            evidence = self._placer.evidence_for(model_id, node.name)
            why = evidence.why if evidence is not None else "as ordered"
            self._decisions.note(what, why, whom, model=model_id, node=node.name, evidence=evidence)
        try:
            failure = await self._orders.load(model_id, node) if is_ours else None
            promise = self._survey.promises.get(key)
            if promise is not None and failure is None:
                promise.ordered_at = time.monotonic()
            if failure is None:
                failure = await self._orders.follow(model_id, node)
        finally:
            del self._began[key]
            self._placer.forget(model_id)
        seconds = time.monotonic() - began
        if failure is None:
            if is_ours:
                self._survey.needs.lasted(self._survey.spec(model_id), make_of(node), node.name, seconds)
            log.info("model is loaded", model=model_id, node=node.name, seconds=round(seconds, 2))
        else:
            self._survey.promises.pop(key, None)
            self._decisions.note("load_failed", failure.reason, whom, model=model_id, node=node.name)
            log.warning("load failed", model=model_id, node=node.name, kind=failure.kind.value, reason=failure.reason)
            if failure.kind in (Kind.NO_ROOM, Kind.OUT_OF_MEMORY):
                await self._learn_from(failure, model_id, node)
        record = LoadRecord(model_id, node.name, seconds, failure.reason if failure else None)
        for call in self.on_load:
            call(record)
        return failure

    async def _learn_from(self, failure: Failure, model_id: str, node: Node) -> None:
        """The node has less room, or the model needs more, than the plan had it: the next one goes by the facts."""
        await self._orders.look(node)
        need_mb = failure.details.get("need_mb")
        if not isinstance(need_mb, int):
            views = self._survey.views([node.name], asyncio.get_running_loop().time())
            need_mb = more_than(views[0]) if views else 0  # out of memory: one more has to go
        self._survey.needs.refused(self._survey.spec(model_id), make_of(node), need_mb)
